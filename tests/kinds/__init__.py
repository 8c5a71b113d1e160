"""Models, data and losses as people write them: which are exact, and which cannot be.

No types here: this is other people's code.
"""

"""Messages between the supervisor, its workers and their helper processes.

Each is a frozen dataclass and travels as one line of JSON (`wire`). Imports `core` and
below, without torch. To add one, write the class in `training` and add it to `Message`.
"""

"""Workers that torchrun starts, on one machine or on several.

entry         the command of one worker: `python -m samestep.worker train|resume`
nodes         `samestep train --nodes`: the command of torchrun, and what its end means
rendezvous    where the agents of torchrun meet: a store that listens on one address
meeting       the workers of one generation find each other (roster) in a store (store)
briefing      what a leader tells the other workers of its machine: a Unix socket
comparing     what every machine must have alike; agreement: what all decide from it
held          the newest state of a machine, which outlives its workers
transfer      gives that state to the machines that lack it
leading       the first worker of a machine keeps the run there
generation    the training between two failures
watcher       acts while the training waits: signals, a parent that is gone
"""

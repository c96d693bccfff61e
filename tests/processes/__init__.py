"""Programs for several processes.

Each compares what the processes find together with an oracle that knows one process only.

Programs with a clean end, which `together.py` runs one after the other in one start:

- live_elements: DDP trains the live elements as one process does, with every hold and option of the wrapper
- observing: C_t under DDP is the mean of the ranks' own
- callback: bytes sent, checkpoints, communication hooks, disagreement, and schedules under DDP
- comm_hook: averaging the live elements only, without a callback
- support: the precisions, holds and granularities of docs/cluster.md
- shards: FSDP2 and tensor parallelism
- live_shards, live_loops: the same with `hold="compact"`, in a Trainer and in a loop of one's own
- masks: masks from the first step under DDP and FSDP2
- norms: still BatchNorm layers under DDP, FSDP2 and tensor parallelism
- probe: masks from a probe under DDP and FSDP2
- selection: exact selection among shards
- checkpoints.save, checkpoints.resume: on any number of ranks

Programs that are killed or signalled, each in a start of its own, all with the runs of `faults`: killed, elastic,
signalled. Programs that torchrun does not start: spawned, and kills, which forks its children itself.
"""

"""Where the runs of an evaluation happen: in this process, or on replicas of the model under Ray.

    base        the interface
    local       here, on the model of this process
    host        a local executor in a process of its own: what a replica is
    cluster     Ray itself, its actors and their deaths
    replicas    many hosts: whole runs go to the replica with the least to do

KV never leaves the process that made it. What is learned does: replicas teach each other, in the order of the samples.
"""

from agentmesh.executors.base import Course, Executor, Job, Where

__all__ = ["Course", "Executor", "Job", "Where"]

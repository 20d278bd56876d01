"""The sandbox for programs that a model wrote: isolation, resource limits, and a process that starts runs quickly."""

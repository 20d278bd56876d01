"""Programs that a model wrote run here: walls, a process that stands ready, limits, a watcher."""

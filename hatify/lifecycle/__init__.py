"""Life after training: forgetting and pruning, more tasks, and finished tasks as plain modules."""

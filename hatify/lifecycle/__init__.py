"""Life after training: what finished tasks can be turned into."""

"""The operator's side: the launcher, the commands, containers."""

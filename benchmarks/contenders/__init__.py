"""Programs that do the same work in different ways, one process each. Started by the modules one floor up."""

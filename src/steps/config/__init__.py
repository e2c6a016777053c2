"""Typed sections of a step's YAML. Free of torch: the dispatcher validates with them before anything starts."""

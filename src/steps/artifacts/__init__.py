"""What passes between steps. Free of torch: a dry run opens artifacts in milliseconds."""

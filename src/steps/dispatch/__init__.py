"""The command line. Free of torch, and nothing here knows a particular step."""

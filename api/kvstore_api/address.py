"""Where the coordinator listens unless somebody says otherwise."""

DEFAULT_ADDRESS = "127.0.0.1:7420"

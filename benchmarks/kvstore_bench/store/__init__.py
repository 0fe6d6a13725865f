"""The benchmark of the data path, beside Redis, Mooncake's store and LMCache's server.

`loop`, which the peers' scripts import as a file, and the processes `server` and `client` are not imported here.
"""

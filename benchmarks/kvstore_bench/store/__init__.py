"""`kvstore bench store`: get and put rates of a storage node, compared with Redis, Mooncake and LMCache's server.

run.py         runs the benchmark
systems.py     the compared systems, and the commands that start their processes
processes.py   starts a server or client process and talks to it
server.py, client.py, kvstore.py   server and client processes of this project
loop.py        the measuring loop of every client process
ports.py       free ports, for the peers' scripts
lookup.py      times of lookups
plot.py        plots the result

`loop` and `ports` are also imported by the peers' scripts, as files.
"""

"""Runs pytest in a guest: a supervisor, and the session that it supervises.

This folder goes to the guest. Its files use only the standard library and pytest, and run on Python 3.9
and newer. Nothing on this side imports them. `__main__` starts two programs:

``serve FOLDER``
    The supervisor: a small process that outlives sessions. It listens on a socket in FOLDER, to which
    one host at a time can attach. It forks sessions, passes messages on, and reports how a session
    ended. It runs in the background.
``attach FOLDER``
    Standard input and output become a connection to the supervisor.

Messages are JSON objects, one a line. To the supervisor::

    {"do": "start", "config": {…}}     start a session, see `process.run`
    {"do": "signal", "name": "INT"}    signal the session's process group (DUMP: show all stacks)
    {"do": "ping", "n": N}             the answer is {"pong": N}
    {"do": "run", …}, {"do": "finish"} are passed on to the session
    {"do": "wake", "seed": HEX, "environment": {…}, "fixtures": {…}} likewise, in a cloned guest; the
                                       answer is {"awake": N}

From the supervisor: the messages of the session (see `control`), ``{"output": TEXT, "of": 1|2}`` if output
is live, and ``{"exit": STATUS, "tail": TEXT}`` when the session has ended (−N: by signal N).
"""

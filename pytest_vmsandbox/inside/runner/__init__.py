"""What runs pytest in a guest: a supervisor, and the session that it supervises.

This folder goes to the guest. Its files know the standard library and pytest only, run on Python 3.9 and
newer, and nobody imports them here. `__main__` starts two programs:

``serve FOLDER``
    The supervisor: a small process that outlives sessions. It listens on a socket in FOLDER, an
    endpoint that can be attached to again and again (one at a time), starts sessions by a fork,
    passes messages on, and tells how a session ended. It goes to the background.
``attach FOLDER``
    Standard input and output become a connection to the supervisor.

Messages are JSON objects, one a line. To the supervisor::

    {"do": "start", "config": {…}}     start a session, see `process.run`
    {"do": "signal", "name": "INT"}    to the session's process group (DUMP: show all stacks)
    {"do": "ping", "n": N}             is answered {"pong": N}
    {"do": "run", …}, {"do": "finish"} for the session, passed on
    {"do": "wake", "seed": HEX, "environment": {…}, "fixtures": {…}} likewise, in a guest that was cloned; is
                                       answered {"awake": N}

From it: what the session says (see `control`), ``{"output": TEXT, "of": 1|2}`` where output is live, and
``{"exit": STATUS, "tail": TEXT}`` when the session has ended (−N: by signal N).
"""

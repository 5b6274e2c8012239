"""What a user could take in place of vitkern: whole networks (networks.py) and ops (ops.py).

Every package is optional, and imported when it is first needed. One that is missing is absent, with
the reason; one that can't do a case says why.
"""

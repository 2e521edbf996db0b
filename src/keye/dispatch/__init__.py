"""Questions for many engines: batches whose answers are written once, and replicas of the server behind one address.

Knows processes, sockets and Ray; what answers is `keye.server` in all cases.
"""

"""Serving: HTTP/1.1 on Unix sockets, the Open Inference Protocol, access rules, the admin API's mechanism."""

"""Messages to a prompt, and a reply to its parts: answer, reasoning, calls of tools, times and places.

Knows the chat format and nothing of media, tokens or models: a medium is a placeholder that others fill in. Text that a
user wrote stays apart from the template's own, so that a special token typed by a user is never one.
"""

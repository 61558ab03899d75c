"""What Linux and systemd give us.

File events, digests, durable writes, places, settings, logs, the service manager. Nothing here
knows of models or prompts. Every room may call it; it calls none but `errors`.
"""

"""The client: a lake behind a service, with the interface of one in a folder."""

"""One HTTP API a module: routes and schemas."""

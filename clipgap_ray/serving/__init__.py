"""The service: routes and what answers (`api`, `backend`; no Ray), Ray Serve (`deployments`, `app`), and `run`."""

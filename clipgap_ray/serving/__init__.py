"""The service: routes from a backend (`api`, `backend`; no Ray), on Ray Serve (`deployments`, `app`), started (`run`)."""

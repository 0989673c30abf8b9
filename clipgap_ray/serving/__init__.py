"""The service: `api` (routes from a backend, no Ray), `backend` (what answers), `deployments` (Ray Serve), `run`."""

"""Entry point of `serve deploy`, named only as the string `serve.app:build_app`; the code is clipgap_ray.serving."""

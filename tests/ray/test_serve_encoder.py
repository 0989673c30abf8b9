"""The service's encoder under load: a second replica comes, and both answer alike."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ray.serve.handle import DeploymentHandle

from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.encoder import EncoderSettings
from tests.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CALLERS = 48  # three times what one replica encodes at once
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)


def test_a_second_replica_comes_under_load_and_answers_alike(ray_session: None) -> None:
    from ray import serve

    from clipgap_ray.serving.deployments import bind_encoder

    encoder = EncoderSettings(model="conv-64-test", pretrained="random", batch_size=16)
    expected = encoder.build().encode_images(IMAGES)
    stop, answered = threading.Event(), [0] * CALLERS
    settings = ServeSettings(index=("pool=unused",), encoder_max_replicas=2)

    def running() -> int:
        return serve.status().applications["encoder"].deployments["EncoderDeployment"].replica_states.get("RUNNING", 0)

    def load(handle: DeploymentHandle, number: int) -> None:
        while not stop.is_set():
            rows = handle.encode_images.remote(IMAGES).result(timeout_s=60)
            np.testing.assert_allclose(rows, expected, atol=1e-5)
            answered[number] += 1

    try:
        serve.start(proxy_location="Disabled")
        handle = serve.run(bind_encoder(settings, encoder), name="encoder", route_prefix=None)
        assert running() == 1
        with ThreadPoolExecutor(CALLERS) as threads:
            loads = [threads.submit(load, handle, number) for number in range(CALLERS)]
            try:
                # A new replica loads torch beside a load that takes every core: on a busy machine, a minute or more.
                until(lambda: running() == 2 or any(one.done() for one in loads), "a second replica", seconds=200)
                assert running() == 2
                before = list(answered)
                until(lambda: all(now > then for now, then in zip(answered, before, strict=True)), "answers of both")
            finally:
                stop.set()
        for one in loads:
            one.result()  # no request failed, none was wrong
    finally:
        stop.set()
        serve.shutdown()

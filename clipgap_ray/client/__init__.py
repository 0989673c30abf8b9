"""A typed client of the service, synchronous and asynchronous.

client = Client("http://127.0.0.1:8000")
for neighbour in client.search(text="a red bird", k=5)[0]:
    print(neighbour.similarity, neighbour.caption)
"""

from clipgap_ray.client.clients import AsyncClient, Client
from clipgap_ray.client.questions import Call, ClassScore, Coverage, IndexInfo, Neighbour, SearchResult, Swap
from clipgap_ray.errors import ServiceError

__all__ = [
    "AsyncClient", "Call", "ClassScore", "Client", "Coverage", "IndexInfo", "Neighbour", "SearchResult", "ServiceError",
    "Swap",
]  # fmt: skip

"""The small client for apps on the device, and the one for the admin socket.

``Client`` and ``AsyncClient`` speak the Open Inference Protocol with binary tensors over ``infer.sock``: numpy arrays
in and out, nothing of the runtimes. ``AdminClient`` speaks to ``admin.sock``. All raise the errors of
``agent.base.errors`` with the server's own text; a call ends within its timeout. A call is sent a second time only when
the first surely had no effect: on a kept connection that turned out closed before the server took the request.

    with Client() as agent:
        answer = agent.infer("digits", {"image": pixels})
        print(answer["probabilities"].argmax(), answer.parameters["variant"])
"""

from __future__ import annotations

from agent.client.admin import ADMIN_SOCKET, AdminClient
from agent.client.asynchronous import AsyncClient
from agent.client.blocking import INFER_SOCKET, Client
from agent.client.tensors import Result

__all__ = ["ADMIN_SOCKET", "INFER_SOCKET", "AdminClient", "AsyncClient", "Client", "Result"]

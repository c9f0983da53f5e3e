"""The fixed baseline: a frame goes DEALER → ROUTER/DEALER → DEALER, a short answer comes back. Nothing is decoded."""

import asyncio
import sys

import zmq
import zmq.asyncio


async def pump(source: zmq.asyncio.Socket, sink: zmq.asyncio.Socket) -> None:
    while True:
        await sink.send_multipart(await source.recv_multipart(copy=False), copy=False)


async def proxy(front: str, back: str) -> None:
    context = zmq.asyncio.Context.instance()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    router.bind(front)
    dealer.bind(back)
    await asyncio.gather(pump(router, dealer), pump(dealer, router))


async def echo(back: str) -> None:
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.connect(back)
    while True:
        client, number, _ = await socket.recv_multipart(copy=False)
        await socket.send_multipart([client, number], copy=False)


if __name__ == "__main__":
    asyncio.run(proxy(*sys.argv[2:]) if sys.argv[1] == "proxy" else echo(*sys.argv[2:]))

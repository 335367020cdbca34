"""An event loop whose time passes only when everyone waits: tests of waiting take no time, and come out the same every time."""

import asyncio
import selectors


class _Jump(selectors.DefaultSelector):
    def __init__(self):
        super().__init__()
        self.now = 1000.0

    def select(self, timeout=None):
        ready = super().select(0 if timeout is not None else 0.01)
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self):
        return self._jump.now


def run(main):
    """Run a coroutine function, given the loop's clock, in virtual time."""

    async def go():
        return await main(asyncio.get_running_loop().time)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(go())

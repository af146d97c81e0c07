"""The state machine that drives the engine through a model world; what must hold is checked at every step."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis import Phase as Stage
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from qemu_blkmig.engine.convergence import Policy
from qemu_blkmig.engine.device import SECTOR
from qemu_blkmig.engine.migration import BlockMigration, Phase, Tuning
from qemu_blkmig.errors import ConnectionLost, MigrationError, TopologyChanged
from tests.engine.world import (
    LIFE,
    Action,
    Cancel,
    Crash,
    Damage,
    Dead,
    Die,
    Discard,
    Disk,
    Fault,
    Injected,
    Nothing,
    Snapshot,
    Violation,
    World,
    Write,
    WritebackError,
)

CHUNK = 4
"""Sectors."""

places = st.integers(0, 10)
guest_actions: st.SearchStrategy[Action] = st.one_of(
    st.builds(Write, st.integers(0, 1), places, st.integers(1, 4), st.integers(0, 3)),
    st.builds(Write, st.integers(0, 1), places, st.integers(1, 4), st.just(0)),
    st.builds(Discard, st.integers(0, 1), places, st.integers(1, 4)),
)
bad_luck: st.SearchStrategy[Action] = st.one_of(
    st.just(Fault()), st.just(WritebackError()), st.just(Cancel()), st.builds(Crash, st.integers(0, 1))
)
damages: st.SearchStrategy[Action] = st.builds(Damage, st.integers(0, 1), places, st.integers(1, 4))
actions: st.SearchStrategy[Action] = st.one_of(
    st.just(Nothing()), guest_actions, guest_actions, guest_actions, bad_luck, damages
)
scripts = st.lists(actions, max_size=40)
rough_scripts = st.builds(
    lambda quiet, luck: [*[Nothing()] * quiet, *luck], st.integers(0, 30), st.lists(bad_luck, min_size=1, max_size=4)
)
POLICY = Policy(downtime=0.004, max_rounds=3)
ROOMY = Policy(downtime=0.02, max_rounds=3)


@st.composite
def disks(draw: st.DrawFn, name: str) -> Disk:
    size = draw(st.integers(1, 11))
    content = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    kind = draw(st.sampled_from(("zero", "garbage", "base")))
    unit = draw(st.sampled_from((1, 1, 2, 4)))
    if kind != "base":
        start = bytearray(size) if kind == "zero" else bytearray([9] * size)
        return Disk(name, bytearray(content), None, kind == "zero", start, [value > 0 for value in content], unit)
    base = bytes(7 for _ in range(size))
    source = bytearray(value or 7 for value in content)
    return Disk(name, source, base, False, bytearray(base), [value > 0 for value in content], unit)


class Machine(RuleBasedStateMachine):
    """Whatever is done to the engine in whatever order, no write is lost, and in fair weather it completes."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.broken = False
        self.percent = 0
        self.finished = False
        self.cancelling = False

    @initialize(
        first=disks("vda"),
        second=st.none() | disks("vdb"),
        granularity=st.integers(1, 3),
        batch=st.integers(1, 3),
        chunks=st.integers(1, 2),
        compare=st.booleans(),
        flushes=st.integers(1, 3),
        granule=st.integers(1, 2),
        stride=st.sampled_from((None, 1.0)),
        room=st.sampled_from((0, 1, 1, 8 * SECTOR)),
        head_start=st.sampled_from((0, 1, 2, 2, 2)),
        script=scripts,
    )
    def begin(
        self,
        first: Disk,
        second: Disk | None,
        granularity: int,
        batch: int,
        chunks: int,
        compare: bool,
        flushes: int,
        granule: int,
        stride: float | None,
        room: int,
        head_start: int,
        script: list[Action],
    ) -> None:
        tuning = Tuning(
            chunk_size=CHUNK * SECTOR,
            range_size=chunks * CHUNK * SECTOR,
            batch=batch,
            flushes=flushes,
            granule=granule * SECTOR,
            stride=stride,
            room=room,
        )
        self.world = World([first, second] if second else [first], granularity, tuning, compare)
        if head_start > 0:
            self.setup([])
        if head_start > 1:
            self.bulk(script)

    @property
    def engine(self) -> BlockMigration:
        return self.world.engine

    @property
    def phase(self) -> Phase:
        return self.engine.figures().phase

    def in_phase(self, *phases: Phase) -> bool:
        return self.phase in phases and not self.finished and not self.cancelling

    def run(self, work: Coroutine[Any, Any, object], script: Sequence[Action] = ()) -> BaseException | None:
        """Do one operation while the script plays; returns what it raised, if that is what the script asked for."""
        world = self.world
        world.script = deque(script)
        world.cancelled = False
        life = world.life
        context = contextvars.copy_context()
        context.run(LIFE.set, life)
        world.operation = self.loop.create_task(work, context=context)
        self.loop.run_until_complete(asyncio.wait({world.operation}))
        operation, world.operation = world.operation, None
        world.script.clear()
        if world.life != life:
            return operation.exception() or Dead()
        error = asyncio.CancelledError() if operation.cancelled() else operation.exception()
        try:
            self._check_after(error)
        except BaseException:
            self.broken = True
            raise
        return error

    def _check_after(self, error: BaseException | None) -> None:
        world = self.world
        if world.violation:
            raise world.violation
        if error and not isinstance(error, Injected | ConnectionLost | TopologyChanged | asyncio.CancelledError):
            raise error
        for disk in world.disks:
            disk.robbed = False
        if world.cancelled and not isinstance(error, asyncio.CancelledError):
            raise Violation(f"a cancellation was swallowed: {error!r}")
        world.check()
        if not world.mover.idle:
            raise Violation("something is still in flight")
        if self.phase is Phase.FAILED:
            if not world.restore_failed:
                raise Violation("failed without a reason")
        else:
            self._check_kept()
        recording = self.phase not in (Phase.CREATED, Phase.CANCELLED) and not self.finished
        recording |= world.interrupted and self.phase is Phase.CREATED
        if world.log.started is not recording and not (self.phase is Phase.CREATED and world.stop_failed):
            raise Violation(f"recording is {world.log.started} in {self.phase}")
        self._check_figures()

    def _check_kept(self) -> None:
        """One round may be kept for what was put off, and nothing but that is owed of it."""
        world, figures = self.world, self.engine.figures()
        if world.interrupted or self.phase in (Phase.CREATED, Phase.CANCELLED):
            return
        put_off = [disk.put_off // SECTOR for disk in figures.disks]
        if len(world.log.rounds) != (1 if any(put_off) else 0):
            raise Violation(f"{len(world.log.rounds)} rounds are held, and {put_off} sectors put off")
        for index, disk in enumerate(world.disks):
            if disk.dead or world.topology_changed:
                continue
            kept = world.log.owed(index) - world.log.recorded(index) - disk.damaged
            differing = sum(disk.source[sector] != disk.destination[sector] for sector in kept if sector < len(disk))
            if differing > put_off[index]:
                raise Violation(f"{differing} sectors of {disk.name} differ, and just {put_off[index]} are put off")

    def _check_figures(self) -> None:
        figures = self.engine.figures()
        if figures.total != sum(len(disk) for disk in self.world.disks) * SECTOR:
            raise Violation("the total is wrong")
        if figures.percent < self.percent and figures.phase is Phase.BULK:
            raise Violation("progress went backwards")
        if (figures.percent == 100) is not (figures.phase is Phase.COMPLETED):
            raise Violation(f"{figures.percent} % in {figures.phase}")
        self.percent = figures.percent

    @precondition(lambda self: self.in_phase(Phase.CREATED) and not self.world.interrupted)
    @rule(script=scripts)
    def setup(self, script: list[Action]) -> None:
        self.world.may_stop_recording = True
        self.run(self.engine.setup(), script[:6])
        self.world.may_stop_recording = False

    @precondition(lambda self: not self.finished and not self.cancelling)
    @rule(
        deeds=st.lists(guest_actions, max_size=3),
        script=st.lists(guest_actions, max_size=20),
        quiet=st.integers(0, 60),
        lost=st.just(-1) | st.integers(0, 2**11 - 1),
        lag=st.sampled_from((0, 0, 0, 1)),
        other=st.booleans(),
    )
    def die_and_resume(
        self, deeds: list[Action], script: list[Action], quiet: int, lost: int, lag: int, other: bool
    ) -> None:
        """The process is killed at any moment; another one takes the migration up, as far as there is one."""
        for deed in deeds:
            self.world.act(deed)
        self.world.finish_writes()
        self.world.may_stop_recording = self.phase is Phase.CREATED
        acts = script[:quiet]
        self.run(self._next_operation(other), [*acts, *[Nothing()] * (quiet - len(acts)), Die()])
        self.world.die()
        self.world.may_stop_recording = False
        self.world.survive(lost, lag)
        self.percent = 0
        if self.world.interrupted and not self.world.topology_changed:
            self.resume([])

    def _next_operation(self, other: bool) -> Coroutine[Any, Any, object]:
        if self.phase is Phase.CREATED:
            return (
                self.engine.resume(self.world.stable(), self.world.known())
                if self.world.interrupted
                else self.engine.setup()
            )
        if self.phase in (Phase.RECORDING, Phase.BULK):
            return self.engine.bulk()
        if self.phase is Phase.FAILED:
            return self.engine.refresh()
        if other:
            return self.engine.converge(POLICY)
        self.world.pause()
        return self.engine.complete()

    @precondition(lambda self: self.in_phase(Phase.CREATED) and self.world.interrupted)
    @rule(script=scripts)
    def resume(self, script: list[Action]) -> None:
        if self.run(self.engine.resume(self.world.stable(), self.world.known()), script[:6]) is None:
            self.world.interrupted = False

    @precondition(lambda self: self.in_phase(Phase.RECORDING, Phase.BULK))
    @rule(script=scripts | rough_scripts)
    def bulk(self, script: list[Action]) -> None:
        if self.run(self.engine.bulk(), script) is None and self.phase is not Phase.DIRTY:
            raise Violation("the bulk pass is over, and the phase is not dirty")

    @precondition(lambda self: self.in_phase(Phase.DIRTY, Phase.COMPLETED))
    @rule(script=scripts | rough_scripts, policy=st.sampled_from((None, POLICY, ROOMY, ROOMY)))
    def round(self, script: list[Action], policy: Policy | None) -> None:
        self.run(self.engine.round(policy), script)

    @precondition(lambda self: self.in_phase(Phase.DIRTY, Phase.COMPLETED))
    @rule(
        hot=st.builds(Write, st.integers(0, 1), places, st.integers(1, 3), st.integers(1, 3)),
        count=st.integers(2, 4),
        script=st.just([]) | scripts | rough_scripts,
        cool=st.booleans(),
    )
    def rounds_over_a_hot_place(self, hot: Write, count: int, script: list[Action], cool: bool) -> None:
        """The guest writes the same place between rounds, which is therefore put off; and then perhaps no more."""
        for number in range(count):
            if number < count - 1 or not cool:
                self.world.act(replace(hot, value=hot.value + number))
                self.world.finish_writes()
            if self.in_phase(Phase.DIRTY, Phase.COMPLETED):
                self.run(self.engine.round(ROOMY), script if number == count - 1 else [])

    @precondition(lambda self: self.in_phase(Phase.DIRTY, Phase.COMPLETED))
    @rule(script=scripts, converge=st.booleans(), policy=st.sampled_from((POLICY, ROOMY)))
    def many_rounds(self, script: list[Action], converge: bool, policy: Policy) -> None:
        self.run(self.engine.converge(policy) if converge else self.engine.keep_in_step(policy), script)

    @precondition(lambda self: self.in_phase(Phase.DIRTY, Phase.COMPLETED))
    @rule(script=st.just([]) | rough_scripts, final=st.booleans())
    def switch_over(self, script: list[Action], final: bool) -> None:
        self.world.pause()
        if self.run(self.engine.complete(), script) is None:
            self.check_switchover()
            if final:
                self.finish()
                return
        self.world.paused = False

    @precondition(lambda self: not self.finished)
    @rule()
    def switch_over_unprepared(self) -> None:
        """Too early, or else while the guest runs."""
        if self.in_phase(Phase.CREATED, Phase.RECORDING, Phase.BULK):
            self.world.pause()
        self.expect_refusal()
        self.world.paused = False

    @precondition(lambda self: self.in_phase(Phase.RECORDING, Phase.BULK, Phase.DIRTY, Phase.COMPLETED))
    @rule(deeds=st.lists(guest_actions | damages, max_size=5), script=scripts)
    def guest_acts_and_somebody_asks(self, deeds: list[Action], script: list[Action]) -> None:
        for deed in deeds:
            self.world.act(deed)
            self.world.finish_writes()
        self.world.check()
        self.run(self.engine.refresh(), script[:2])

    @precondition(lambda self: any(disk.death_noticed for disk in self.world.disks))
    @rule()
    def restart_writers(self) -> None:
        for disk in self.world.disks:
            if disk.death_noticed:
                disk.dead = disk.death_noticed = False
        self.world.check()

    @precondition(lambda self: self.phase is not Phase.CREATED)
    @rule(deed=st.sampled_from(("nothing", "nothing", "nothing", "snapshot", "cancel")), script=rough_scripts)
    def end_badly(self, deed: str, script: list[Action]) -> None:
        if deed == "snapshot":
            self.world.act(Snapshot())
        elif deed == "cancel":
            self.cancelling = True
            self.world.may_stop_recording = True
            if self.run(self.engine.cancel(), script) is None and not self.finished and self.phase != Phase.CANCELLED:
                raise Violation("cancelled, and the phase does not say so")
            self.world.may_stop_recording = False

    def expect_refusal(self) -> None:
        """A switchover that must not be: refused, and nothing has changed by it."""

        async def attempt() -> None:
            try:
                await self.engine.complete()
            except MigrationError:
                return
            raise Violation("a switchover that must be refused was not")

        phase = self.phase
        self.run(attempt())
        if self.phase is not phase and phase is not Phase.COMPLETED:
            raise Violation("a refusal changed the phase")

    def check_switchover(self) -> None:
        self.world.check_equal()
        if self.phase is not Phase.COMPLETED or self.world.mover.bandwidth is not None or self.world.log.rounds:
            raise Violation("switched over in the wrong state")

    def finish(self) -> None:
        self.world.may_stop_recording = True
        self.finished = True
        self.run(self.engine.finish())
        self.world.may_stop_recording = False

    def teardown(self) -> None:
        """After all that has happened: in fair weather the migration completes, or it can be cancelled."""
        try:
            if not self.broken and hasattr(self, "world"):
                self.fair_weather()
        finally:
            self.loop.close()

    def fair_weather(self) -> None:
        self.world.paused = False
        if self.world.topology_changed or self.cancelling or self.phase is Phase.FAILED:
            self.give_up()
        elif not self.finished:
            self.world.may_stop_recording = False
            self.carry_through()

    def give_up(self) -> None:
        if not self.finished:
            self.world.pause()
            self.expect_refusal()
            self.world.may_stop_recording = True
            self.run(self.engine.cancel())
            self.run(self.engine.cancel())

    def carry_through(self) -> None:
        self.world.writeback_error = False
        for _ in range(2 + 2 * len(self.world.disks)):
            if self.phase is Phase.CREATED and self.world.interrupted:
                self.resume([])
            elif self.phase is Phase.CREATED:
                self.run(self.engine.setup())
            if self.run(self.engine.bulk() if self.phase is not Phase.COMPLETED else self.engine.round()) is None:
                self.world.pause()
                if self.run(self.engine.complete()) is None:
                    self.check_switchover()
                    self.finish()
                    return
            self.restart_writers()
        raise Violation("in fair weather the migration does not complete")


FEW = 10
"""Many short runs find a rare bug sooner than one long run, in which Hypothesis varies what it has tried already."""


def explore(starts: Iterable[int]) -> None:
    """Run the state machine from each of these seeds, until it finds a violation. Raises `Violation`."""
    for start in starts:
        machine = seed(start)(type("Seeded", (Machine,), {}))
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=FEW,
                stateful_step_count=14,
                deadline=None,
                database=None,
                phases=[Stage.generate],
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )

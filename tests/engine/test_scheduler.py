"""Decisions as values: who gets tokens, who is admitted, who must go. No step is run here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.block_pool import BlockPool
from engine.prefix_cache import PrefixCache
from engine.rules import FinishRules
from engine.scheduler import Schedule, Scheduler, SchedulerLimits
from engine.sequence import Running, Track, Waiting
from proto.hashing import BlockHasher
from tests.support.paged_engine import make_facts, make_request

SIZE = 4
HASHER = BlockHasher("test", SIZE)


def track(arrival: int, length: int, *, n: int = 1, output: int = 0, hold: bool = False, priority: int = 0) -> Track:
    prompt = [2 + (arrival + i) % 13 for i in range(length)]
    request = make_request(f"r{arrival}", prompt, n=n, max_tokens=40)
    made = Track(
        request, FinishRules.of(request, make_facts()), priority, arrival, tuple(range(n)), [3] * output, is_held=hold
    )
    made.extend_hashes(HASHER, len(made) // SIZE)
    return made


class Scene:
    """Sequences placed on a pool by hand."""

    def __init__(self, num_blocks: int = 64, **limits: int | bool) -> None:
        self.cache = PrefixCache(BlockPool(num_blocks))
        defaults: dict[str, int | bool] = {"max_num_seqs": 8, "max_num_batched_tokens": 16}
        self.scheduler = Scheduler(SchedulerLimits(block_size=SIZE, **(defaults | limits)))
        self.running: list[Running] = []

    def run(self, sequence: Track, num_computed: int, num_blocks: int | None = None) -> Running:
        blocks = self.cache.allocate(-(-len(sequence) // SIZE) if num_blocks is None else num_blocks)
        made = Running(sequence, blocks, num_computed)
        self.running.append(made)
        return made

    def decide(self, waiting: Sequence[Track] = (), num_seats_taken: int = 0, urgent: bool = False) -> Schedule:
        queue = sorted((Waiting(each, urgent) for each in waiting), key=lambda each: each.rank)
        before = self.cache.num_free
        schedule = self.scheduler.decide(self.running, queue, self.cache, num_seats_taken)
        assert self.cache.num_free == before, "deciding changes nothing"
        return schedule


def rows(schedule: Schedule) -> list[tuple[str, int]]:
    continued = [(chunk.sequence.track.id, chunk.num_tokens) for chunk in schedule.chunks]
    return continued + [(each.waiting.track.id, each.num_tokens) for each in schedule.admissions]


def test_decodes_come_before_chunks_and_chunks_before_admissions() -> None:
    scene = Scene()
    scene.run(track(1, 20), 4)
    scene.run(track(2, 5, output=1), 5)
    scene.run(track(3, 5, output=1), 5)
    assert rows(scene.decide([track(4, 9)])) == [("r1", 14), ("r2", 1), ("r3", 1)]
    scene = Scene()
    scene.run(track(1, 20), 10)
    assert rows(scene.decide([track(4, 9)])) == [("r1", 10), ("r4", 6)]


def test_long_prompts_leave_room_for_others_under_the_threshold() -> None:
    scene = Scene(long_prefill_token_threshold=6)
    assert rows(scene.decide([track(1, 20), track(4, 8), track(9, 8)])) == [("r1", 6), ("r4", 6), ("r9", 4)]


def test_without_chunks_a_prompt_is_whole_or_not_at_all() -> None:
    scene = Scene(enable_chunked_prefill=False)
    scene.run(track(1, 5, output=1), 5)
    assert rows(scene.decide([track(2, 16)])) == [("r1", 1)]
    assert rows(scene.decide([track(2, 15)])) == [("r1", 1), ("r2", 15)]
    assert rows(scene.decide([track(2, 10), track(7, 6)])) == [("r1", 1), ("r2", 10)]


def test_more_decodes_than_tokens_run_the_first_in_rank() -> None:
    scene = Scene(max_num_batched_tokens=2)
    for arrival in (3, 1, 2):
        scene.run(track(arrival, 5, output=1), 5)
    assert rows(scene.decide([track(9, 4)])) == [("r1", 1), ("r2", 1)]


def test_seats_count_choices_and_promises() -> None:
    scene = Scene(max_num_seqs=4)
    scene.run(track(1, 5, output=1), 5)
    assert len(scene.decide([track(2, 3, n=3)]).admissions) == 1
    full = scene.decide([track(2, 3, n=3)], num_seats_taken=1)
    assert not full.admissions
    assert full.is_full


def test_an_admission_takes_blocks_for_all_its_tokens_and_what_is_cached() -> None:
    scene = Scene()
    first = track(1, 13)
    blocks = scene.cache.allocate(2)
    for block_hash, block in zip(first.hashes, blocks, strict=False):
        scene.cache.insert(block_hash, block)
    scene.cache.release(blocks)
    [admission] = scene.decide([first]).admissions
    assert admission.matched == tuple(blocks)
    assert (admission.num_new_blocks, admission.num_tokens) == (2, 5)


def test_the_last_token_is_computed_even_if_all_is_cached() -> None:
    scene = Scene()
    first = track(1, 8)
    for block_hash, block in zip(first.hashes, scene.cache.allocate(2), strict=True):
        scene.cache.insert(block_hash, block)
    [admission] = scene.decide([first]).admissions
    assert len(admission.matched) == 1
    assert admission.num_tokens == 4


def test_cached_blocks_in_the_free_queue_are_not_counted_twice() -> None:
    scene = Scene(num_blocks=3)
    first = track(1, 13)
    blocks = scene.cache.allocate(2)
    for block_hash, block in zip(first.hashes, blocks, strict=False):
        scene.cache.insert(block_hash, block)
    scene.cache.release(blocks)
    # It needs 4 blocks: 2 matched, 2 new; but pinning the match leaves only one free.
    schedule = scene.decide([first])
    assert not schedule.admissions
    assert schedule.is_full


def test_an_admission_leaves_one_block_for_each_that_grows() -> None:
    scene = Scene(num_blocks=4)
    scene.run(track(1, 5, output=1), 5)
    assert len(scene.decide([track(2, 4)]).admissions) == 1
    assert not scene.decide([track(2, 5)]).admissions
    assert len(scene.decide([track(2, 4)]).admissions) == 1


def test_nobody_passes_the_first_who_finds_no_room() -> None:
    scene = Scene(num_blocks=4)
    schedule = scene.decide([track(1, 20), track(2, 1)])
    assert schedule.is_empty
    assert schedule.is_full


def test_the_last_in_rank_is_preempted_for_the_first() -> None:
    scene = Scene(num_blocks=6)
    first = scene.run(track(1, 7, output=2), 8, num_blocks=2)
    scene.run(track(2, 7, output=1), 7)
    last = scene.run(track(3, 7, output=1), 7)
    schedule = scene.decide([track(4, 1)])
    assert schedule.preemptions == (last,)
    assert schedule.chunks[0].sequence is first
    assert [chunk.num_new_blocks for chunk in schedule.chunks] == [1, 0]
    assert not schedule.admissions
    assert schedule.is_full


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    scene = Scene(num_blocks=12)
    scene.run(track(1, 7, output=2), 8, num_blocks=2)
    last = scene.run(track(3, 30, output=8), 37)
    # The last has ten blocks: taking them leaves more than enough for the newcomer, who would be gone again soon.
    schedule = scene.decide([track(4, 1)])
    assert schedule.preemptions == (last,)
    assert not schedule.admissions
    assert schedule.is_full


def test_the_last_waits_with_its_blocks_instead_of_preempting_itself() -> None:
    scene = Scene(num_blocks=4)
    scene.run(track(1, 6, output=1), 6)
    scene.run(track(2, 7, output=2), 8, num_blocks=2)
    schedule = scene.decide([track(3, 1)])
    assert rows(schedule) == [("r1", 1)]
    assert not schedule.preemptions
    assert schedule.is_full


def test_rank_is_priority_then_arrival() -> None:
    scene = Scene(num_blocks=4)
    old = scene.run(track(1, 7, output=1, priority=5), 7)
    scene.run(track(2, 7, output=2, priority=0), 8, num_blocks=2)
    assert scene.decide().preemptions == (old,)


def test_held_prompts_are_never_preempted() -> None:
    scene = Scene(num_blocks=4)
    scene.run(track(1, 7, output=2), 8, num_blocks=2)
    scene.run(track(2, 8, hold=True), 4)
    schedule = scene.decide()
    assert not schedule.preemptions
    assert rows(schedule) == [("r2", 4)]


def test_dropping_a_shared_block_frees_nothing() -> None:
    scene = Scene(num_blocks=4)
    first = scene.run(track(1, 7, output=2), 8, num_blocks=2)
    second = scene.run(track(2, 4, output=1), 4, num_blocks=1)
    third = scene.run(track(3, 4, output=1), 4, num_blocks=1)
    scene.cache.pin(first.blocks)
    third.blocks[:0] = first.blocks
    third.num_computed += 8
    third.track.output += [3] * 8
    schedule = scene.decide()
    assert schedule.preemptions == (third,), "one of its own blocks is enough"
    assert second.track.id not in dict(rows(schedule)), "and nothing is left for the second, who waits"


def test_sharers_copy_their_partial_block_but_for_the_last_of_them() -> None:
    scene = Scene()
    prompt = scene.run(track(1, 6, n=3), 6)
    scene.running.clear()
    for choice in range(3):
        fork = prompt.track.fork(choice)
        fork.append(5)
        if choice:
            scene.cache.pin(prompt.blocks)
        scene.running.append(Running(fork, list(prompt.blocks), 6))
    schedule = scene.decide()
    assert [(chunk.copies_last, chunk.num_new_blocks) for chunk in schedule.chunks] == [
        (True, 1),
        (True, 1),
        (False, 0),
    ]


def test_a_spare_block_serves_for_the_copy() -> None:
    scene = Scene(num_blocks=3)
    sequence = scene.run(track(1, 6, output=1), 6, num_blocks=3)
    scene.cache.pin(sequence.blocks[:2])
    [chunk] = scene.decide().chunks
    assert (chunk.copies_last, chunk.num_new_blocks) == (True, 0)


def test_a_newcomer_waits_for_a_prefix_that_is_being_computed() -> None:
    scene = Scene(max_num_batched_tokens=64)
    running = scene.run(track(1, 20), 4)
    scene.cache.insert(running.track.hashes[0], running.blocks[0])
    twin, stranger = track(1, 20), track(7, 20)
    twin.arrival = 2
    assert rows(scene.decide([twin, stranger])) == [("r1", 16), ("r7", 20)]
    scene = Scene(max_num_batched_tokens=64)
    assert rows(scene.decide([track(1, 20), twin])) == [("r1", 20)]


def test_a_long_queue_of_twins_is_not_searched_to_its_end() -> None:
    scene = Scene(max_num_batched_tokens=64, max_num_seqs=4)
    queue = [track(1, 20) for _ in range(9)]
    for arrival, each in enumerate(queue, 1):
        each.arrival = arrival
    seen = []

    def watched() -> Iterator[Waiting]:
        for each in queue:
            seen.append(each)
            yield Waiting(each)

    schedule = scene.scheduler.decide([], watched(), scene.cache)
    assert [admission.waiting.track for admission in schedule.admissions] == queue[:1]
    assert len(seen) == 6


def test_preempted_work_is_admitted_before_new_work_of_its_priority() -> None:
    new, old, urgent = Waiting(track(1, 3)), Waiting(track(2, 3), True), Waiting(track(3, 3, priority=-1))
    assert sorted([new, old, urgent], key=lambda each: each.rank) == [urgent, old, new]

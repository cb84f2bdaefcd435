"""Claims: who may write which shard, and who works on which samples, among processes that share a capture.

All that is decided here is decided under one lock, and only between living writers. Which of them live, the backend
knows: exactly on a local disk, where the shard of a dead writer is taken over; or only as far as heartbeats tell, on
object storage. There a writer that was taken for dead may wake up at any time. So before anybody takes what it had
reserved, each shard that it had claimed is given up for all, by a commit that holds nothing: a commit is created once, so
either it or the writer's own is there.
"""

import json
import secrets
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from itertools import count

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.commits import Commit, list_commits
from hiddenlake.cache.store.files import trouble
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.metadata import arrays
from hiddenlake.cache.store.signing import check_signed, parse, sign, to_json_bytes

# Of one claim: more than any has.
_MOST_BYTES = 1 << 16

# One with the smallest numbers that there are.
_LEAST = to_json_bytes({"writer": "0" * 16, "fencing": 1, "crc32c": 0})


class Claims:
    """One writer's standing in a capture: its name, its reservations and its claims.

    Methods that say so must be called inside `with claims.lock():`.

    living : writers that lived when the lock was taken. Commits are published without the lock, so whoever reads them
        after this knows all commits of the others, which are dead.
    """

    def __init__(self, place: Backend, layout: Layout) -> None:
        self.place = place
        self.layout = layout
        self.writer = secrets.token_hex(8)
        self.living: set[str] = set()
        self._member = place.join(self.writer)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """The capture's one lock, held for as long as deciding takes; never while data is written."""
        with self.place.lock():
            self.check()
            writers = self.place.writers()
            self.living = {self.writer, *(writer for writer in writers if self.place.lives(writer))}
            if not self.place.exact:
                for writer in set(writers) - self.living:
                    self._give_up(writer)
            yield

    def check(self) -> None:
        """Raise StoreError when this writer was taken for dead, so that others may do its work."""
        self._member.check()

    def leave(self) -> None:
        """Let go of everything. Reservations and uncommitted claims no longer count."""
        self._member.leave()

    def _give_up(self, writer: str) -> None:
        """A writer that may be dead can commit nothing any more, and what it has claimed stays empty.

        It is expelled before its claims are looked for: so it either finds that out before it commits, or its claim is
        found here. It is forgotten when that is done: who dies in between leaves it to the next.
        """
        self.place.expel(writer)
        committed = list_commits(self.place)
        for name in self.place.list_files("claims"):
            held = self.read(f"claims/{name}")
            if name.isdecimal() and int(name) not in committed and held is not None and held[0] == writer:
                nothing = (None,) * self.layout.samples
                now = datetime.now(UTC).isoformat(timespec="seconds")
                spans = nothing if self.layout.token_files else ()
                Commit(int(name), self.writer, held[1] + 1, {}, nothing, nothing, {}, now, spans).create(self.place)
        self.place.forget(writer)

    def reserved_by_others(self) -> set[str]:
        """Keys that other living writers work on. Under the lock."""
        reserved: set[str] = set()
        for writer in self.living - {self.writer}:
            for line in self.place.appended(writer):
                try:
                    reserved.update(json.loads(line))
                except (ValueError, TypeError) as error:
                    raise CorruptError(
                        f"{self.place}: what writer {writer} reserved cannot be read ({error}): stop all writers of this "
                        f"capture and run the same command again"
                    ) from error
        return reserved

    def reserve(self, keys: list[str]) -> None:
        """Tell the other writers. Under the lock."""
        self._member.append(json.dumps(keys).encode())

    def read(self, claim: str) -> tuple[str, int] | None:
        """(writer, fencing) of a claim (`sample_claim`, `token_claim`), or None."""
        return read_claim(self.place, claim)

    def claim(self) -> tuple[int, int]:
        """Claim the lowest sample shard that nobody committed and no living writer holds. Under the lock.

        Returns (shard, fencing number).
        """
        committed = list_commits(self.place)
        shard = next(k for k in count() if k not in committed and not self._held(sample_claim(k)))
        return shard, self._take(sample_claim(shard), self.layout.files_of(shard) + self._derived(shard))

    def claim_tokens(self, first: int | None, shards: int, committed: Container[int]) -> dict[int, int]:
        """Claim neighbouring token shards that no commit vouches for and no living writer holds. Under the lock.

        first : the lowest of them, or None for the first run that is free.
        committed : token shards that the capture's commits, read under the same lock, vouch for.

        Returns shard -> fencing number; empty where `first` was given and some of them are not free.
        """

        def free(shard: int) -> bool:
            return shard not in committed and not self._held(token_claim(shard))

        if first is None:
            first, run = 0, 0
            for shard in count():
                first, run = (first, run + 1) if free(shard) else (shard + 1, 0)
                if run == shards:
                    break
        elif not all(map(free, range(first, first + shards))):
            return {}
        return {
            shard: self._take(token_claim(shard), self.layout.token_files_of(shard))
            for shard in range(first, first + shards)
        }

    def _held(self, claim: str) -> bool:
        """Whether a shard is not to be had."""
        held = self.read(claim)
        return held is not None and (held[0] in self.living or not self.place.exact)

    def _take(self, claim: str, files: list[str]) -> int:
        """Take a claim that is free, removing the files that a dead writer left. Returns its fencing number."""
        held = self.read(claim)
        fencing = 1 if held is None else held[1] + 1
        document = to_json_bytes(sign({"writer": self.writer, "fencing": fencing}))
        if held is None:
            # Durable before anything is published under it: an fsync here would wait for the shard before.
            if not self.place.create(claim, document, durable=False) and self.read(claim) != (self.writer, fencing):
                raise self._appeared(claim)
        elif not self.place.exact:
            # It was free a moment ago: the lock is somebody else's by now, and so are the files.
            raise self._appeared(claim)
        else:
            for name in files:
                self.place.remove(name)
            self.place.write(claim, document)
        return fencing

    def _appeared(self, claim: str) -> StoreError:
        return StoreError(
            f"{self.place}/{claim} appeared while this process held the capture's lock: the file system does not "
            f"honour flock (put the capture on a local one), or this process stood still for long (run the "
            f"same command again)"
        )

    def _derived(self, shard: int) -> list[str]:
        return list(self.layout.derived_files(shard).values())

    def sweep(
        self,
        look: Callable[[], Mapping[int, Commit]],
        remove: Callable[[str], None] | None = None,
        forget: bool = True,
    ) -> None:
        """Remove what dead writers left: unfinished files, and shards without a commit. Under the lock.

        look : reads the commits that count.
        remove : called with each file instead of removing it.  forget : whether dead writers are forgotten.

        What a living writer holds is never touched. Claims stay: the next to claim counts their fencing up.
        """
        for file in list(self._left_under_lock(look()) if self.place.exact else self._left_for_good(look)):
            (remove or self.place.remove)(file)
        if forget and self.place.exact:  # else that was done when the lock was taken
            for writer in set(self.place.writers()) - self.living:
                self.place.forget(writer)

    def _left_under_lock(self, counting: Mapping[int, Commit]) -> Iterator[str]:
        """Where the lock cannot be lost."""
        commits, tokens = list_commits(self.place), _token_shards(counting)

        @cache
        def held(claim: str) -> bool:
            found = self.read(claim)
            return found is not None and found[0] in self.living

        for folder in self._folders():
            for name in self.place.list_files(folder):
                final = self.place.final_name(name)
                claim, there = self._claim_of(folder, final or name, commits, tokens)
                if final is None:
                    left = claim is not None and not there and not held(claim)
                elif folder == "failures":
                    left = final.partition(".")[0] not in self.living
                else:
                    # Without a claim it is metadata or itself a claim, which is written under the lock only.
                    left = claim is None or not held(claim)
                if left:
                    yield f"{folder}/{name}" if folder else name

    def _left_for_good(self, look: Callable[[], Mapping[int, Commit]]) -> Iterator[str]:
        """Where the lock is lost by a process that stands still: what nobody will ever vouch for, whoever holds it now.

        A claim stays its writer's, and a writer that is forgotten has committed all that it ever will. So commits are read
        after that is seen, and not before.
        """
        counting = look()
        commits, tokens = _kept(counting), _token_shards(counting)
        found = [
            (f"{folder}/{name}", claim)
            for folder in ("samples", *arrays(self.layout, 1, 1))
            for name in self.place.list_files(folder)
            for claim, there in [self._claim_of(folder, name, commits, tokens)]
            if claim is not None and not there
        ]
        if not found:
            return
        owners = {claim: held[0] for claim in {claim for _, claim in found} if (held := self.read(claim)) is not None}
        known = {*self.place.writers(), self.writer}
        counting = look()
        commits, tokens = _kept(counting), _token_shards(counting)
        for file, claim in found:
            folder, _, name = file.rpartition("/")
            if owners.get(claim, self.writer) not in known and not self._claim_of(folder, name, commits, tokens)[1]:
                yield file

    def _claim_of(
        self, folder: str, name: str, commits: Container[int], committed: Container[int]
    ) -> tuple[str | None, bool]:
        """(the claim that a file is written under, whether its shard was committed), or (None, False)."""
        file = f"{folder}/{name}"
        if folder == "commits":
            shard = int(name[:-5]) if name[:-5].isdecimal() else None
        elif (shard := self.layout.token_shard_of(file)) is not None:
            return token_claim(shard), shard in committed
        else:
            shard = self.layout.shard_of(file)
        return (None, False) if shard is None else (sample_claim(shard), shard in commits)

    def _folders(self) -> Iterator[str]:
        yield from ("", "claims", "commits", "failures", "samples", "writers")
        yield from arrays(self.layout, 1, 1)


def _token_shards(commits: Mapping[int, Commit]) -> set[int]:
    """Those that some of the commits vouch for."""
    return {shard for commit in commits.values() for shard in commit.token_shards}


def _kept(commits: Mapping[int, Commit]) -> set[int]:
    """Sample shards that are not given up."""
    return {shard for shard, commit in commits.items() if commit.files}


def sample_claim(shard: int) -> str:
    """The file that says who may write a sample shard."""
    return f"claims/{shard}"


def token_claim(shard: int) -> str:
    """The file that says who may write a token shard."""
    return f"claims/tokens.{shard}"


def read_claim(place: Backend, claim: str) -> tuple[str, int] | None:
    """(writer, fencing) of a claim, or None where there is none. Raises CorruptError, StoreError.

    What a power cut may leave of one that was not durable yet, under which nothing was published, is nobody's.
    """
    file = f"{place}/{claim}"
    try:
        raw = place.read(claim, _MOST_BYTES)
        if _torn(raw):
            return "", 0
        document = check_signed(parse(raw), file)
        writer, fencing = document["writer"], document["fencing"]
        if not isinstance(writer, str) or type(fencing) is not int:
            raise TypeError(document)
        return writer, fencing
    except FileNotFoundError:
        return None
    except OSError as error:
        raise trouble(file, error) from error
    except (ValueError, KeyError, TypeError, CorruptError) as error:
        raise CorruptError(
            f"{file}: not a claim ({error!r}): stop all writers of this capture, run `hiddenlake repair {place}`, "
            f"and run the same command again"
        ) from error


def _torn(raw: bytes) -> bool:
    """Whether a claim is the start of one only, or zeros: what is left of one that was not durable."""
    start = _LEAST[: min(len(raw), _LEAST.index(b"0"))]
    return not raw.strip(b"\0") or (len(raw) < len(_LEAST) and raw.startswith(start) and not raw.endswith(b"\n"))


def enter(place: Backend, layout: Layout) -> Claims:
    """Become a writer of a capture."""
    # Under the lock, so that nobody sees the writer before it lives and takes it for dead.
    with place.lock():
        return Claims(place, layout)

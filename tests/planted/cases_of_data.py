"""Faults for the cases of data, and of files that are hostile or damaged."""

from __future__ import annotations

from tests.planted.entry import Planted

_CHECK = "tests/data/indexed/test_check.py::"
_CACHE = "tests/data/indexed/test_cache.py::"
_CAUSAL = "tests/data/test_causal.py::"
_BLEND = "tests/data/test_blend.py::"

DATA = (
    Planted(
        row="case 15",
        fault="a .bin may be longer than its index says",
        file="megatron_moe/data/indexed/check.py",
        old="    if bin_size != total:",
        new="    if bin_size < total:",
        test=_CHECK + "test_refused_at_open",
    ),
    Planted(
        row="case 15",
        fault="an offset may leave a gap",
        file="megatron_moe/data/indexed/scan.py",
        old='_reject(path, "offset of sequence", offsets != due,',
        new='_reject(path, "offset of sequence", offsets < due,',
        test=_CHECK + "test_refused_by_the_scan",
    ),
    Planted(
        row="case 15",
        fault="a short read ends a sequence",
        file="megatron_moe/data/causal.py",
        old="""                what = f"length of the tokens at byte {offset} of {self.path}"
                raise UsageError(what, len(content), f"{wanted} bytes")
""",
        new="                break\n",
        test=_CAUSAL + "test_short_reads",
    ),
    Planted(
        row="case 15",
        fault="an index without document bounds is read",
        file="megatron_moe/data/indexed/check.py",
        old="    if bounds < 1:",
        new="    if bounds < 0:",
        test=_CHECK + "test_refused_at_open",
    ),
    Planted(
        row="case 16",
        fault="an id equal to the vocabulary's size passes the scan",
        file="megatron_moe/data/indexed/scan.py",
        old="        if not 0 <= value < vocab_size:",
        new="        if not 0 <= value <= vocab_size:",
        test=_CHECK + "test_range_and_documents",
    ),
    Planted(
        row="case 16",
        fault="an id equal to the vocabulary's size is written",
        file="megatron_moe/data/indexed/writer.py",
        old="if ids.min() < 0 or ids.max() >= self.vocab_size:",
        new="if ids.min() < 0 or ids.max() > self.vocab_size:",
        test="tests/data/indexed/test_writer.py::test_id_beyond_the_vocabulary",
    ),
    Planted(
        row="case 16",
        fault="ids are checked at open alone, not when they are read",
        file="megatron_moe/data/causal.py",
        old="        self._check_ids(text, documents)\n",
        new="",
        test=_CAUSAL + "test_an_id_that_came_later_is_refused",
    ),
    Planted(
        row="case 17",
        fault="the fingerprint of a corpus is of its index alone",
        file="megatron_moe/data/indexed/check.py",
        old="in ((index, idx_size), (tokens, bin_size)):",
        new="in ((index, idx_size),):",
        test=_CHECK + "test_fingerprint",
    ),
    Planted(
        row="case 17",
        fault="the end of a large file is in no block",
        file="megatron_moe/data/indexed/check.py",
        old="np.linspace(0, size - _SAMPLE, _SAMPLES)",
        new="np.linspace(0, size - _SAMPLE, _SAMPLES, endpoint=False)",
        test=_CHECK + "test_fingerprint",
    ),
    Planted(
        row="case 17",
        fault="sample indices are named without their corpus' content",
        file="megatron_moe/data/causal.py",
        old='            "content": self.source.fingerprint,',
        new='            "content": self.dataset_path,',
        test=_CAUSAL + "test_replaced_corpus_gets_new_indices",
    ),
    Planted(
        row="case 18",
        fault="a process that waited for the lock builds again",
        file="megatron_moe/data/indexed/cache.py",
        old="                    if _version(folder) == seen:",
        new="                    if folder.parent.exists():",
        test=_CACHE + "test_one_of_several_processes_builds",
    ),
    Planted(
        row="case 18",
        fault="the lock is a shared one",
        file="megatron_moe/data/indexed/cache.py",
        old="fcntl.flock(stream, fcntl.LOCK_EX)",
        new="fcntl.flock(stream, fcntl.LOCK_SH)",
        test=_CACHE + "test_a_killed_builder_is_replaced",
    ),
    Planted(
        row="case 18",
        fault="partial entries are swept while others write them",
        file="megatron_moe/data/indexed/cache.py",
        old="if time.time() - left.stat().st_mtime > _STALE:",
        new="if time.time() - left.stat().st_mtime >= 0:",
        test=_CACHE + "test_partial_entries_of_the_dead_are_swept",
    ),
    Planted(
        row="case 19",
        fault="a source of weight 0 is read",
        file="megatron_moe/data/blend.py",
        old="zip(words[1::2], weights, strict=True) if w > 0]",
        new="zip(words[1::2], weights, strict=True) if w >= 0]",
        test=_BLEND + "test_weight_zero_is_left_out",
    ),
    Planted(
        row="case 19",
        fault="all weights may be 0",
        file="megatron_moe/data/blend.py",
        old="weight < 0 for weight in weights) or not any(weights):",
        new="weight < 0 for weight in weights):",
        test=_BLEND + "test_bad_weights",
    ),
    Planted(
        row="case 19",
        fault="a window begins in an empty document",
        file="megatron_moe/data/objectives/windows.py",
        old='held_by = np.searchsorted(bounds, begins, side="right") - 1',
        new='held_by = np.maximum(np.searchsorted(bounds, begins, side="left") - 1, 0)',
        test="tests/data/objectives/test_windows.py::test_the_example_of_the_windows",
    ),
    Planted(
        row="case 19",
        fault="tokens before a document are counted in 32 bits",
        file="megatron_moe/data/objectives/windows.py",
        old="    np.cumsum(lengths[joined], out=bounds[1:])",
        new="    bounds[1:] = np.cumsum(lengths[joined], dtype=np.int32)",
        test="tests/data/objectives/test_windows.py::test_beyond_two_to_the_31_tokens",
    ),
)

HOSTILE = (
    Planted(
        row="case 22",
        fault="the index cache may load pickles",
        file="megatron_moe/data/indexed/cache.py",
        old='np.load(path, mmap_mode="r")',
        new="np.load(path, allow_pickle=True)",
        test=_CACHE + "test_files_that_are_no_arrays_are_refused",
    ),
    Planted(
        row="case 22",
        fault="PyTorch's files may run code",
        file="megatron_moe/convert/hf_files.py",
        old='map_location="cpu", weights_only=True, mmap=mapped)',
        new='map_location="cpu", weights_only=False, mmap=mapped)',
        test="tests/convert/test_payloads.py::test_in_pytorch_s_files",
    ),
    Planted(
        row="case 22",
        fault="a link in a checkpoint may lead out of it",
        file="megatron_moe/checkpoint/directory.py",
        old="if not _FILE.fullmatch(name) or (path / name).resolve().parent != path.resolve():",
        new="if not _FILE.fullmatch(name):",
        test="tests/checkpoint/test_directory.py::test_a_link_that_leaves_the_checkpoint_is_rejected",
    ),
    Planted(
        row="case 22",
        fault="a name in a manifest may be a path",
        file="megatron_moe/checkpoint/directory.py",
        old='_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")',
        new='_FILE = re.compile(r"[A-Za-z0-9_./-]{0,200}")',
        test="tests/checkpoint/test_directory.py::test_a_manifest_that_leaves_the_checkpoint_is_rejected",
    ),
    Planted(
        row="case 22",
        fault="the static check accepts a shell",
        file="tools/check_architecture.py",
        old='FORBIDDEN_KEYWORDS = {"shell": "runs a shell", "allow_pickle": "reads pickles"}',
        new='FORBIDDEN_KEYWORDS = {"allow_pickle": "reads pickles"}',
        test="tests/test_architecture.py::test_forbidden",
    ),
    Planted(
        row="case 23",
        fault="fields of state.json may have any type",
        file="megatron_moe/checkpoint/metadata.py",
        old="        if type(values[name]) is not kind:",
        new="        if values[name] is None:",
        test="tests/checkpoint/test_reading.py::test_progress_of_another_type_is_rejected",
    ),
    Planted(
        row="case 23",
        fault="a tuple of any depth may be a key of a pickle",
        file="megatron_moe/convert/pickled.py",
        old="    if not all(isinstance(part, _KEYS) for part in inner):",
        new="    if not all(isinstance(part, (*_KEYS, tuple)) for part in inner):",
        test="tests/convert/test_pickled.py::test_nested_tuples_are_no_keys",
        hangs=True,
    ),
)

CASES_OF_DATA = (*DATA, *HOSTILE)

"""Faults for the features that protect a run: what it reads, counts and says."""

from __future__ import annotations

from tests.planted.entry import Planted

_CACHE = "tests/data/indexed/test_cache.py::"
_TEXT = "tests/test_text.py::"
_READING = "tests/data/preprocess/test_reading.py::"
_REPLICAS = "tests/training/test_replicas.py::"

IDENTITY = (
    Planted(
        row="feature 9",
        fault="of the files of an index cache, sizes alone are compared",
        file="megatron_moe/data/indexed/cache.py",
        old="if one != recorded[n]]",
        new="if one is None or one[0] != recorded[n][0]]",
        test=_CACHE + "test_a_changed_entry_is_built_again",
    ),
    Planted(
        row="feature 9",
        fault="a manifest is read, but not compared with the files",
        file="megatron_moe/data/indexed/cache.py",
        old='return f"{\', \'.join(changed)} changed since it was built" if changed else ""',
        new='return ""',
        test="tests/data/test_identity.py::test_an_order_that_was_changed_in_the_cache_is_never_trained_on",
    ),
    Planted(
        row="feature 9",
        fault="another order of the sources is no difference",
        file="megatron_moe/data/identity.py",
        old="        if before != now:\n            orders",
        new="        if len(before) != len(now):\n            orders",
        test="tests/data/test_identity.py::test_each_part_is_named[order]",
    ),
    Planted(
        row="feature 9",
        fault="a changed source is named as a new one",
        file="megatron_moe/data/identity.py",
        old="        if prefix in paths:",
        new="        if content in paths:",
        test="tests/data/test_identity.py::test_new_content_at_the_old_path_is_named",
    ),
    Planted(
        row="feature 9",
        fault="the step of a manifest is not compared with its directory's name",
        file="megatron_moe/checkpoint/directory.py",
        old='    _check_step(path, content.get("step"))\n',
        new="",
        test="tests/checkpoint/test_directory.py::test_a_directory_of_another_step_is_an_error_that_names_both",
    ),
    Planted(
        row="feature 9",
        fault="the steps of revisions are not compared",
        file="megatron_moe/checkpoint/directory.py",
        old="if named is None or step == int(named[1]):",
        new="if named is None or named[2] is not None or step == int(named[1]):",
        test="tests/checkpoint/test_directory.py::test_a_revision_has_the_step_of_its_name",
    ),
)

ERRORS = (
    Planted(
        row="feature 10",
        fault="an error line shows a value as long as it is",
        file="megatron_moe/errors.py",
        old="(got {echoed(found)})",
        new="(got {found!r})",
        test="tests/test_errors.py::test_long_values_are_cut_in_the_middle",
    ),
    Planted(
        row="feature 10",
        fault="control characters above 127 are not escaped",
        file="megatron_moe/console.py",
        old="(*range(32), *range(127, 160))",
        new="(*range(32), 127)",
        test="tests/test_errors.py::test_control_characters_are_escaped_everywhere",
    ),
    Planted(
        row="feature 10",
        fault="files get escapes and terminals the text itself",
        file="megatron_moe/console.py",
        old="if stream.isatty() else text",
        new="if not stream.isatty() else text",
        test="tests/test_console.py::test_a_terminal_gets_no_control_characters",
    ),
    Planted(
        row="feature 10",
        fault="a float of JSON may be infinite, if it is not NaN",
        file="megatron_moe/text.py",
        old="if math.isfinite(value := float(text)):",
        new="if not math.isnan(value := float(text)):",
        test=_TEXT + "test_json_of_settings_is_strict",
    ),
    Planted(
        row="feature 10",
        fault="2^63 counts as an integer of 64 bits",
        file="megatron_moe/text.py",
        old="not -(1 << 63) <= value < 1 << 63:",
        new="not -(1 << 63) <= value <= 1 << 63:",
        test=_TEXT + "test_toml_of_settings_is_strict",
    ),
    Planted(
        row="feature 10",
        fault="a named pipe is opened as a file is, which waits for its writer",
        file="megatron_moe/files.py",
        old="os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC",
        new="os.O_RDONLY | os.O_CLOEXEC",
        test="tests/test_files.py::test_a_named_pipe_does_not_block",
        hangs=True,
    ),
    Planted(
        row="feature 10",
        fault="a special file is read",
        file="megatron_moe/files.py",
        old="if not stat.S_ISREG(mode) and not str(path).startswith(_HANDLES):",
        new="if stat.S_ISDIR(mode) and not str(path).startswith(_HANDLES):",
        test=_TEXT + "test_a_named_pipe_is_no_file",
    ),
    Planted(
        row="feature 10",
        fault="an index may name a file with a path",
        file="megatron_moe/files.py",
        old='or set(name) & {"/", "\\0"}:',
        new='or "\\0" in name:',
        test="tests/convert/test_hf_files.py::test_an_index_names_files_of_its_directory",
    ),
    Planted(
        row="feature 10",
        fault="pieces of a SentencePiece model are not decoded at the start",
        file="megatron_moe/tokenizer/sentencepiece.py",
        old="        self._check_pieces(path)\n",
        new="",
        test="tests/tokenizer/test_sentencepiece.py::test_pieces_that_are_not_utf8_are_refused",
    ),
)

BOMBS = (
    Planted(
        row="feature 11",
        fault="the length of a line is compared after it was read",
        file="megatron_moe/text.py",
        old="while line := stream.readline(most + 1):",
        new="while line := stream.readline():",
        test=_READING + "test_bombs_take_bounded_memory[a.jsonl.gz]",
    ),
    Planted(
        row="feature 11",
        fault="the limit --max-record-bytes is not compared with rows of Parquet",
        file="megatron_moe/data/preprocess/reading.py",
        old="            _check_rows(file.metadata, set(keys), path, most)\n",
        new="",
        test=_READING + "test_rows_of_parquet_are_bounded",
    ),
    Planted(
        row="feature 11",
        fault="--max-record-bytes does not limit the windows of Zstandard",
        file="megatron_moe/data/preprocess/zstd.py",
        old="        if window > self._window:",
        new="        if window > _LARGEST_WINDOW:",
        test=_READING + "test_zstd_windows_up_to_two_gib",
    ),
    Planted(
        row="feature 11",
        fault="a record of PyTorch's files may be compressed",
        file="megatron_moe/convert/hf_files.py",
        old="if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:",
        new="if info.compress_type != zipfile.ZIP_STORED and info.file_size > size:",
        test="tests/convert/test_hf_files.py::test_records_of_a_bin_file_are_not_compressed",
    ),
)

COUNTS = (
    Planted(
        row="feature 12",
        fault="--deterministic-mode only warns",
        file="megatron_moe/platform/determinism.py",
        old="torch.use_deterministic_algorithms(True)",
        new="torch.use_deterministic_algorithms(True, warn_only=True)",
        test="tests/training/test_hooks.py::test_deterministic_mode_holds_during_training",
    ),
    Planted(
        row="feature 12",
        fault="one deterministic algorithm of NCCL is enough",
        file="megatron_moe/platform/determinism.py",
        old="if not chosen or any(word not in _NCCL for word in chosen):",
        new="if not chosen or all(word not in _NCCL for word in chosen):",
        test="tests/training/test_hooks.py::test_libraries_are_set_up_and_contradicting_variables_are_errors",
    ),
    Planted(
        row="feature 12",
        fault="the ledger notices repeated tokens, but not lost ones",
        file="megatron_moe/moe/statistics.py",
        old="if layer.tokens != routed:",
        new="if layer.tokens > positions:",
        test="tests/moe/test_statistics.py::test_every_position_is_accounted_for",
    ),
    Planted(
        row="feature 12",
        fault="no step compares the ledger",
        file="megatron_moe/training/trainer.py",
        old="        check_ledger(layers, positions, moe.moe_router_topk, moe.moe_ignore_padding_tokens)"
        "\n",
        new="",
        test="tests/training/test_ledger.py::test_a_micro_batch_that_is_not_counted_ends_the_run_on_every_rank",
    ),
    Planted(
        row="feature 12",
        fault="replicas of experts are compared over all data-parallel ranks",
        file="megatron_moe/training/replicas.py",
        old="(True, run.ctx.pgs.expt_dp)",
        new="(True, run.ctx.pgs.dp_cp)",
        test=_REPLICAS
        + "test_a_flipped_bit_ends_the_run_on_every_rank[EP2-input_layernorm-1-norm]",
    ),
    Planted(
        row="feature 12",
        fault="weights are hashed while they are gathered",
        file="megatron_moe/training/replicas.py",
        old="    finish_parameter_gather(run.wrapped)\n",
        new="",
        test=_REPLICAS + "test_healthy_replicas_are_equal[DP2 overlapped]",
    ),
    Planted(
        row="feature 12",
        fault="the last bits of weights are not hashed",
        file="megatron_moe/training/replicas.py",
        old="chunk = bits[start : start + _CHUNK].long()",
        new="chunk = bits[start : start + _CHUNK].long() >> 1",
        test=_REPLICAS
        + "test_a_flipped_bit_ends_the_run_on_every_rank[DP2-router.weight-1-moe.router.weight: rank]",
    ),
)

SECURITY = (
    Planted(
        row="feature 13",
        fault="JSON that is nested too deep is no typed error",
        file="megatron_moe/text.py",
        old=""".encode(errors="surrogateescape")
    except RecursionError:""",
        new=""".encode(errors="surrogateescape")
    except MemoryError:""",
        test="tests/fuzz/test_seeds.py::test_seeds[run-config]",
    ),
    Planted(
        row="feature 13",
        fault="the names that an error line shows are not escaped",
        file="megatron_moe/errors.py",
        old="(in_line(text, _PARTS[name]) for name, text in parts.items())",
        new="(_cut(text, _PARTS[name]) for name, text in parts.items())",
        test="tests/fuzz/test_seeds.py::test_seeds[hf-index]",
    ),
)

FEATURES_OF_VALUES = (*IDENTITY, *ERRORS, *BOMBS, *COUNTS, *SECURITY)

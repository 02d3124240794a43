"""Is every small change of the library's numbers seen by a quick test? See docs/mutation.md.

cosmic-ray makes the changes, one at a time, in a copy of the checkout. The tests run in a child of
a process that has imported JAX and PyTorch, so that a mutant costs its tests and no start.

    pip install cosmic-ray==8.7.0
    python scripts/mutation.py --out=mutants.jsonl optim data/order

With the same --out again it tries what has survived, or has not been tried.
"""

import argparse
import ast
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "JAX_COMPILATION_CACHE_DIR": f"{tempfile.gettempdir()}/flax-resnet-mutation-cache",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
ROOT = Path(__file__).resolve().parents[1]
IMPORTS = ["flax.nnx", "jax.numpy", "optax", "torch", "pytest", "scipy.stats", "beartype"]
PYTEST = ["-x", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", "--tb=line"]
TESTS = {  # the quick tests that concern a module, those that kill most or cost least first
    "optim": """
        optimizer::the_rate_is_pytorchs_to_the_bit_at_each_of_64000_steps
        optimizer::weights_and_momentum_are_pytorchs_through_warm_up_and_both_drops""",
    "data/order": """
        augmentation::a_draw_is_the_same_for_ever
        augmentation::without_flip_none_is_flipped_and_the_rest_is_the_same
        augmentation::each_epoch_sees_every_example_once_in_an_order_of_its_own
        augmentation::other_paddings_too
        augmentation::no_two_steps_share_their_random_numbers
        augmentation::a_draw_is_a_pure_function_of_seed_and_step""",
    "data/pixels": """
        augmentation::evaluation_batches_hold_every_example_once_and_padding
        augmentation::pytorch_sees_the_same_pixels
        augmentation::each_offset_and_flip_cuts_what_slicing_by_hand_does
        augmentation::the_padding_is_zero_after_the_subtraction
        pretrained
        augmentation::evaluation_counts_each_example_once_and_padding_nowhere""",
    "weights/templates": """
        layouts::keys_by_hand
        layouts::keys_that_no_name_has
        layouts::other_numbers_of_blocks
        layouts::a_name_that_the_layout_has_not
        layouts::to_the_key_and_back
        layouts::an_unknown_key_is_refused_by_name
        layouts::a_block_too_many_in_one_list""",
    "weights/layouts": """
        layouts
        round_trip::a_model_that_no_network_of_the_layout_is_like
        round_trip::what_stands_where_no_projection_is_used_decides_no_layout
        round_trip::tanjeffreyzs_unused_projections_are_the_exception
        round_trip::pytorch_to_flax_to_pytorch
        convert::a_bad_state_dict""",
    "weights/infer": """
        architecture
        convert::a_bad_state_dict
        convert::another_shortcut_than_told
        convert::what_is_in_doubt_is_said
        round_trip::flax_to_pytorch_to_flax""",
    "step": """
        metrics
        augmentation::evaluation_counts_each_example_once_and_padding_nowhere
        batch_norm::running_statistics_are_pytorchs_after_1_and_50_steps
        batch_norm::a_batch_is_one_share_unless_devices_are_told
        parallel::replica_statistics_are_pytorchs_on_each_share
        parallel::global_statistics_on_many_devices_are_those_of_one[8-pmap]
        parallel::global_statistics_on_many_devices_are_those_of_one[8-jit]""",
    "nn/batch_norm": """
        batch_norm::the_result_and_its_gradients_are_pytorchs
        batch_norm::in_evaluation_mode_the_result_is_pytorchs
        batch_norm::gradients_through_the_ending_are_jaxs_own_at_zero_too
        batch_norm::two_values_are_enough
        batch_norm::one_value_per_channel_is_an_error
        batch_norm::no_value_is_an_error
        batch_norm::one_value_is_enough_in_evaluation_mode
        batch_norm::running_statistics_are_pytorchs_after_1_and_50_steps
        image_sizes::training_is_pytorchs
        parallel::replica_statistics_are_pytorchs_on_each_share
        parallel::global_statistics_on_many_devices_are_those_of_one[8-pmap]""",
    "nn/convolution": "convolution",
    "resnet": """
        image_sizes::training_is_pytorchs
        architecture::who_keeps_it
        evaluation::every_block_is_pytorchs_with_channels_padded_in_the_centre
        scan::the_gradients_program_has_what_was_asked_for
        scan::a_scanned_network_starts_from_the_same_weights
        evaluation::every_block_is_pytorchs_in_float64[paper-20-A]
        initialization::uniform_biases_reach_their_bounds_and_no_further
        initialization::every_random_tensor_has_its_formulas_distribution
        initialization::every_other_tensor_is_the_same_constant_to_the_bit""",
}
BINARY = (
    "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul RShift_LShift BitOr_BitAnd "
    "BitAnd_BitOr"
)
COMPARISON = (
    "Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt"
)
OTHERS = (
    "ReplaceUnaryOperator_USub_UAdd ReplaceUnaryOperator_Delete_Not AddNot ReplaceTrueWithFalse "
    "ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue "
    "ReplaceContinueWithBreak ExceptionReplacer NumberReplacer RemoveDecorator ZeroIterationForLoop"
)
OPERATORS = [
    *(f"ReplaceBinaryOperator_{pair}" for pair in BINARY.split()),
    *(f"ReplaceComparisonOperator_{pair}" for pair in COMPARISON.split()),
    *OTHERS.split(),
]


class Mutant(NamedTuple):
    """A module with one change."""

    module: str
    change: str  # the operator, where, and the line that it makes
    code: str


def bytecode(code: CodeType) -> tuple[Any, ...]:
    """What a module does, wherever its lines stand."""
    inner = [bytecode(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return code.co_code, code.co_exceptiontable, code.co_names, code.co_varnames, tuple(inner)


def mutants(module: str) -> Iterator[Mutant]:
    """Every change outside annotations; of those that compile to the same code the first."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / "flax_resnet" / f"{module}.py").read_text()
    tree = list(ast.walk(ast.parse(source)))
    notes = [getattr(n, field, None) for n in tree for field in ("annotation", "returns")]
    spans = [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in notes if n]
    seen = {bytecode(compile(source, module, "exec"))}
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        nodes = ast_nodes(get_ast(source))
        places = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for i, place in enumerate(places):
            code = mutate_code(source, operator, i)
            try:
                key = bytecode(compile(code, module, "exec"))
            except SyntaxError:
                continue
            is_signature = any(getattr(n, "posonlyargs", None) for n in ast.walk(ast.parse(code)))
            is_note = any(start <= place < end for start, end in spans)
            if key in seen or is_signature or is_note:  # the star of a signature is no product
                continue
            seen.add(key)
            lines = zip(source.splitlines(), code.splitlines(), strict=False)
            new = next((b for a, b in lines if a != b), "")
            yield Mutant(module, f"{name} {place[0]}:{place[1]} {' '.join(new.split())}", code)


def start(tree: Path, mutant: Mutant, seconds: int) -> int:
    """Begins a mutant's tests in a copy of the checkout; a process's id."""
    (tree / "flax_resnet" / f"{mutant.module}.py").write_text(mutant.code)
    pid = os.fork()
    if pid:
        return pid
    log = os.open(tree / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    signal.alarm(10 * seconds)  # in case it waits for ever
    os.chdir(tree)
    sys.path[0] = str(tree)
    sys.dont_write_bytecode = True  # two mutants of one second and size would be one file
    tests = (test.partition("::") for test in TESTS[mutant.module].split())
    ids = [f"parity_tests/test_{file}.py{sep}{sep and 'test_'}{name}" for file, sep, name in tests]
    os._exit(importlib.import_module("pytest").main([*PYTEST, *ids]))


def plan(modules: list[str], out: Path, sample: int | None, seed: int) -> list[Mutant]:
    """The mutants of the modules that no test has killed yet, before each module's the original."""
    lines = map(json.loads, out.read_text().splitlines() if out.exists() else [])
    killed = {(line["module"], line["change"]) for line in lines if line["killer"]}
    work: list[Mutant] = []
    for module in modules:
        found = list(mutants(module))
        random.Random(seed).shuffle(found)  # so that a run that is stopped has tried a sample
        print(f"{module}: {len(found)} mutants", flush=True)
        work.append(Mutant(module, "nothing", (ROOT / "flax_resnet" / f"{module}.py").read_text()))
        work += [mutant for mutant in found[:sample] if mutant[:2] not in killed]
    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="+", choices=TESTS)
    parser.add_argument(
        "--out",
        type=lambda path: Path(path).expanduser(),
        required=True,
        help="a line of JSON for each mutant",
    )
    parser.add_argument("--sample", type=int, help="so many of each module's, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=60, help="of CPU: more, and it is killed")
    flags = parser.parse_args()
    work = plan(flags.modules, flags.out, flags.sample, flags.seed)[::-1]
    originals = {mutant.module: mutant for mutant in work if mutant.change == "nothing"}
    for name in IMPORTS:  # nothing of this project, and nothing that starts a backend of JAX
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="flax-resnet-mutation-") as parent:
        free = [Path(parent, str(job)) for job in range(flags.jobs)]
        for tree in free:
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git"))
        running: dict[int, tuple[Path, Mutant]] = {}
        while work or running:
            while work and free:
                tree, mutant = free.pop(), work.pop()
                running[start(tree, mutant, flags.seconds)] = tree, mutant
            pid, status, usage = os.wait3(0)
            tree, mutant = running.pop(pid)
            path = tree / "flax_resnet" / f"{mutant.module}.py"
            path.write_text(originals[mutant.module].code)
            log = (tree / "log").read_text()
            if status and mutant.change == "nothing":
                sys.exit(f"the tests of {mutant.module} fail without a mutant:\n{log}")
            failed = [line for line in log.splitlines() if line.startswith(("FAILED", "ERROR"))]
            killer = failed[0] if failed else f"status {status}" if status else None
            seconds = round(usage.ru_utime + usage.ru_stime)
            row = dict(zip(Mutant._fields[:2], mutant, strict=False))
            row |= {"killer": killer, "seconds": seconds}
            with flags.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print("killed  " if status else "survived", *row.values(), flush=True)
            free.append(tree)


if __name__ == "__main__":
    main()

"""``score_mod`` and ``mask_mod``: formulas in CUDA C++ that become part of a kernel (docs/modifiers.md).

A formula is code. What is refused here keeps mistakes from becoming other programs, not strangers out.
"""

from __future__ import annotations

import functools
import keyword
import math
import numbers
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

NAMES = ("score_mod", "mask_mod")
MAX_ARGS = 16  # a kernel's parameters have to fit into 4 KB
MAX_AXES = 4
_REMEMBERED = 1024  # formulas that were checked: a call of a known one costs microseconds

_INDICES = ("b", "h", "q", "kv")
_VARIABLES = {"score_mod": ("score", *_INDICES), "mask_mod": _INDICES}
_FUNCTION_NAMES = "exp exp2 log log2 tanh sin cos sqrt rsqrt floor ceil fabs abs fmin fmax min max pow"
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_WORDS = _FUNCTIONS | {"true", "false", "INFINITY", "float", "int", "bool", "and", "or", "not"}
# What an argument cannot be called, beside the names above, Python's keywords and what begins with "_".
_TAKEN_NAMES = """
alignas alignof asm auto bitand bitor case catch char compl concept const const_cast consteval constexpr
constinit decltype default delete do double dynamic_cast enum explicit export extern friend goto inline long
mutable namespace new noexcept nullptr operator private protected public register reinterpret_cast requires
short signed sizeof static static_assert static_cast struct switch template this thread_local throw typedef
typeid typename union unsigned using virtual void volatile wchar_t xor
Config Dual ModArray Params bf16 blockDim blockIdx float_in_place_of fp16 gridDim int_in_place_of threadIdx
warpSize
"""
_TAKEN = frozenset(_TAKEN_NAMES.split())

# Compiled here: torch.compile traces what checks a formula, but cannot trace the compiler of expressions.
_ARGUMENT_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)
_GOES_ON = re.compile(r"[\w.]")  # after a number, which then is none
_WORD = re.compile(r"\w+")
_TOKEN = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<number>(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)[fFuUlL]*)"
    r"|(?P<word>[A-Za-z_]\w*)"
    r"|(?P<operator>&&|\|\||<<|>>|<=|>=|==|!=|[-+*/%<>!&|^~?:(),\[\]])",
    re.ASCII,
)
_DIGRAPHS = ("<:", ":>", "<%", "%>", "%:", "::")
_COMMENTS = ("//", "/*", "*/")

_STORED = {
    "bool": "bool",
    "int8": "signed char",
    "int16": "short",
    "int32": "int",
    "int64": "long long",
    "uint8": "unsigned char",
    "uint16": "unsigned short",
    "uint32": "unsigned",
    "uint64": "unsigned long long",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "float",
    "float64": "double",
}
DTYPES = tuple(_STORED)
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")  # of arguments that have a gradient


class Formulas(NamedTuple):
    """The formulas of a call, "" for none, and the names of their arguments, in alphabetical order."""

    score_mod: str = ""
    mask_mod: str = ""
    numbers: tuple[tuple[str, str], ...] = ()  # arguments that are Python numbers → "int" or "float"

    @property
    def given(self) -> tuple[str, ...]:
        return tuple(name for name in NAMES if getattr(self, name))


NO_FORMULAS = Formulas()


class ModArg(NamedTuple):
    """What a program depends on of one argument."""

    name: str
    dtype: str  # of an array; "int" or "float" of a Python number
    ndim: int = 0

    @property
    def operand(self) -> str:
        return operand_name(self.name)


def operand_name(name: str) -> str:
    """How the argument ``name`` is called among the operands, and in messages."""
    return f"mod_args[{name!r}]"


def is_mod_arg(operand: str) -> bool:
    return operand.startswith("mod_args[")


def arg_name(operand: str) -> str:
    """The argument that ``operand_name`` called so."""
    return operand[len("mod_args['") : -len("']")]


def collect_formulas(given: Mapping[str, Any]) -> tuple[Formulas, dict[str, Any]]:
    """The formulas, checked as far as the arrays' axes do not matter, and their arguments as operands."""
    args = _mod_args(given.get("mod_args"))
    names, arrays = tuple(args), tuple(name for name, x in args.items() if not isinstance(x, int | float))
    texts = {}
    used: set[str] = set()
    for name in NAMES:
        text = given.get(name)
        if text is None:
            continue
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a string, a CUDA C++ expression, or None, got {text!r}")
        used |= _mentioned(name, text, names, arrays)
        texts[name] = text
    if unused := [name for name in args if name not in used]:
        raise ValueError(f"mod_args has {' and '.join(unused)}, which no formula mentions")
    kinds = tuple(
        (name, "float" if isinstance(x, float) else "int")
        for name, x in args.items()
        if isinstance(x, int | float)
    )
    return Formulas(**texts, numbers=kinds), {operand_name(name): x for name, x in args.items()}


def _mod_args(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"mod_args must be a mapping of names to arrays and numbers, got {given!r}")
    if len(given) > MAX_ARGS:
        raise ValueError(f"mod_args has {len(given)} arguments; at most {MAX_ARGS} are allowed")
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"mod_args must have names for keys, got {name!r}")
        _check_arg_name(name)
    return {name: _number(name, given[name]) for name in sorted(given)}


@functools.lru_cache(_REMEMBERED)
def _check_arg_name(name: str) -> None:
    is_name = _ARGUMENT_NAME.fullmatch(name) is not None
    reserved = {*_VARIABLES["score_mod"], *_WORDS, *_TAKEN}
    if not is_name or name in reserved or keyword.iskeyword(name) or name.startswith("cuflash"):
        raise ValueError(
            f"mod_args has {name!r}, which cannot be an argument's name: it must begin with a letter and "
            "be neither an index, a function nor a keyword"
        )


def _number(name: str, x: Any) -> Any:
    """An array as it is, a number as an int of 32 bits or a float."""
    if isinstance(x, numbers.Integral):  # True is 1
        if not -(2**31) <= int(x) < 2**31:
            raise ValueError(f"{operand_name(name)} must fit into 32 bits, got {x}")
        return int(x)
    return float(x) if isinstance(x, numbers.Real) else x


# --- what is an expression ----------------------------------------------------------------------------------


def _refuse(name: str, what: str) -> ValueError:
    return ValueError(f"{name} must be one CUDA C++ expression: {what}")


def _tokens(name: str, text: str) -> list[tuple[str, str]]:
    """(kind, text) of all that ``text`` consists of, spaces too."""
    for pairs, kind in ((_COMMENTS, "a comment"), (_DIGRAPHS, "punctuation that stands for other")):
        for pair in pairs:
            if pair in text:
                raise _refuse(name, f"{pair!r} is {kind}, which it must not have")
    tokens, at = [], 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or found.lastgroup is None:
            line = text.count("\n", 0, at) + 1
            raise _refuse(name, f"{text[at]!r} in line {line} is no part of one")
        if found.lastgroup == "number" and _GOES_ON.match(text, found.end()):
            raise _refuse(name, f"{found[0] + text[found.end()]!r} is no number")
        tokens.append((found.lastgroup, found[0]))
        at = found.end()
    if all(kind == "space" for kind, _ in tokens):
        raise _refuse(name, "it is empty")
    _check_brackets(name, [token for kind, token in tokens if kind != "space"])
    return tokens


def _check_brackets(name: str, tokens: Sequence[str]) -> None:
    """Brackets match, as ? and : do, and commas are between arguments and between indices only."""
    open_ones: list[str] = []  # "f(" for the parenthesis of a function
    for before, token, after in zip(("", *tokens), tokens, (*tokens[1:], ""), strict=False):
        if token == "(" and before in _FUNCTIONS:
            open_ones.append("f(")
        elif token in ("(", "[", "?"):
            open_ones.append(token)
        elif token in (")", "]", ":"):
            if not open_ones or open_ones.pop() + token not in ("f()", "()", "[]", "?:"):
                raise _refuse(name, f"{token!r} closes nothing")
        elif token == "," and (not open_ones or open_ones[-1] not in ("f(", "[")):
            raise _refuse(
                name,
                "',' may be between the arguments of a function and the indices of an array only; a decimal "
                "point is '.'",
            )
        elif token == "float" and after != "(":
            raise _refuse(name, "a float is made as in 'float(x)'")
    if open_ones:
        raise _refuse(name, f"{open_ones[-1][-1]!r} is never closed")


def _words(name: str, text: str) -> list[str]:
    return [token for kind, token in _tokens(name, text) if kind == "word"]


@functools.lru_cache(_REMEMBERED)
def _mentioned(name: str, text: str, args: tuple[str, ...], arrays: tuple[str, ...]) -> frozenset[str]:
    """Those of ``args`` that a formula mentions, once it is checked."""
    known = {*_VARIABLES[name], *_WORDS, *args}
    unknown = list(dict.fromkeys(word for word in _words(name, text) if word not in known))
    if unknown:
        of_args = f"mod_args has {', '.join(args)}" if args else "there are no mod_args"
        raise ValueError(
            f"{name} mentions {' and '.join(unknown)}, which it does not know: it has "
            f"{', '.join(_VARIABLES[name])}, functions of numbers ({', '.join(sorted(_FUNCTIONS))}), and "
            f"{of_args}"
        )
    for array, _ in _subscripts(name, text):
        if array not in arrays:
            raise _refuse(name, f"{array or 'what is no name'} is indexed, but only an array can be")
    return frozenset(_words(name, text)).intersection(args)


def _subscripts(name: str, text: str) -> Iterator[tuple[str, int]]:
    """What each "[" follows, "" if that is no name, and how many indices it has."""
    tokens = [token for token in _tokens(name, text) if token[0] != "space"]
    for i, (_, token) in enumerate(tokens):
        if token != "[":
            continue
        depth, indices = 0, 1
        for _, inner in tokens[i:]:
            depth += (inner in ("(", "[")) - (inner in (")", "]"))
            indices += inner == "," and depth == 1
            if depth == 0:
                break
        kind, before = tokens[i - 1] if i else ("", "")
        yield before if kind == "word" else "", indices


def check_axes(formulas: Formulas, args: Sequence[ModArg]) -> None:
    """Arrays are indexed with as many indices as they have axes, and only so."""
    for name in formulas.given:
        text = getattr(formulas, name)
        subscripts = list(_subscripts(name, text))
        for arg in args:
            counts = [count for array, count in subscripts if array == arg.name]
            mentions = _words(name, text).count(arg.name)
            wrong = [count for count in counts if count != arg.ndim] or [0] * (mentions - len(counts))
            if not arg.ndim and counts:
                raise ValueError(f"{name} indexes {arg.name}, but {arg.operand} is a single number")
            if arg.ndim and wrong:
                raise ValueError(
                    f"{name} must give {arg.name} one index for each axis: it gives {wrong[0]}, and "
                    f"{arg.operand} has {arg.ndim}"
                )


# --- what is compiled ---------------------------------------------------------------------------------------


def depends_on(formula: str, index: str) -> bool:
    """Whether ``formula`` mentions an index, so that its values may differ along that axis."""
    return index in _WORD.findall(formula)


def source(score_mod: str, mask_mod: str, args: Sequence[ModArg], first_line: int) -> str:
    """The formulas as functions, for a translation unit in which this starts at ``first_line``."""
    if not score_mod and not mask_mod:
        return ""
    lines = [
        '#include "core/dual.cuh"',
        '#include "core/mod_args.cuh"',
        "#ifndef INFINITY",
        "#define INFINITY __int_as_float(0x7f800000)",
        "#endif",
    ]
    if score_mod:
        lines += _function("score_mod", score_mod, args, first_line + len(lines))
    if mask_mod:
        lines += _function("mask_mod", mask_mod, args, first_line + len(lines))
    return "\n".join(lines) + "\n"


def sites(score_mod: str, args: Sequence[ModArg], wanted: Sequence[str]) -> tuple[str, ...]:
    """The places where a score_mod reads elements of the ``wanted`` arguments: the name at each of them.

    An argument of no axes is read once, wherever it is mentioned.
    """
    words = _words("score_mod", score_mod)
    single = {arg.name for arg in args if arg.ndim == 0 and arg.name in wanted}
    several = [word for word in words if word in wanted and word not in single]
    return (*several, *(name for name in wanted if name in single and name in words))


def gradient_source(score_mod: str, args: Sequence[ModArg], wanted: Sequence[str], first_line: int) -> str:
    """``score_mod_by``, its derivative by what it reads at each of its sites, to come after ``source``."""
    head = '#include "core/mod_arg_gradient.cuh"'
    at = sites(score_mod, args, wanted)
    return "\n".join([head, *_function("score_mod", score_mod, args, first_line + 1, at)]) + "\n"


def _function(
    name: str, text: str, args: Sequence[ModArg], first_line: int, at: Sequence[str] = ()
) -> list[str]:
    """The lines of a formula as a function or, with sites, of its derivative by what it reads there."""
    returned, first = ("Dual", "const Dual score, ") if name == "score_mod" else ("bool", "")
    indices = ", ".join(f"const int {index}" for index in _INDICES)
    lines = [
        "",
        f"template <{'int cuflash_site, ' if at else ''}class Params>",
        f"__device__ __forceinline__ {returned}",
        f"{name}{'_by' if at else ''}(const Params& cuflash_params, {first}{indices}"
        f"{', long long& cuflash_at' if at else ''}) {{",
    ]
    mentioned = _words(name, text)
    lines += [_declaration(i, arg, at) for i, arg in enumerate(args) if arg.name in mentioned]
    # Messages name the formula and its line, and show it alone.
    lines += [f'#line 1 "{name}"', f"  return static_cast<{returned}>("]
    lines += [f'#line 1 "{name}"', *_translated(name, text, args, at).split("\n"), ");"]
    return [*lines, f'#line {first_line + len(lines) + 1} "stub.cu"', "}"]


def _declaration(i: int, arg: ModArg, at: Sequence[str]) -> str:
    where = f"cuflash_params.mod_args[{i}]"
    if arg.dtype in ("int", "float"):
        return f"  const {arg.dtype} {arg.name} = {arg.dtype}_in_place_of({where});"
    array = f"ModArray<{_STORED[arg.dtype]}, {arg.ndim}>"
    made = f"{array}{{{where}, cuflash_params.mod_arg_axes[{i}]}}"
    if arg.ndim == 0:
        read = _read(at.index(arg.name), made) if arg.name in at else made
        return f"  const auto {arg.name} = {read}();"
    return f"  const {array} {arg.name} = {made};"


def _translated(name: str, text: str, args: Sequence[ModArg], at: Sequence[str]) -> str:
    """C++17 has one index to a subscript: an array is called instead. And float(x) keeps a slope."""
    indexed = {arg.name for arg in args if arg.ndim and arg.name in at}
    called, site = [], 0
    for kind, token in _tokens(name, text):
        if kind == "word" and token in indexed:
            called.append(_read(site, token))
            site += 1
        else:
            called.append({"[": "(", "]": ")", "float": "cuflash_float"}.get(token, token))
    return re.sub(r"[^\S\n]", " ", "".join(called))  # what Python takes for line breaks, C++ does not


def _read(site: int, array: str) -> str:
    return f"cuflash_read<cuflash_site == {site}>({array}, cuflash_at)"


def blamed(log: str, config: Any) -> ValueError | None:
    """The error to raise where a compiler's ``log`` points into a formula of ``config``, else None."""
    found = re.search(r"^(score_mod|mask_mod)[(:](\d+)\)?[^\n]*\berror\b", log, re.MULTILINE)
    text = getattr(config.modifiers, found[1]) if found and hasattr(config, "modifiers") else ""
    if found is None or not text:
        return None
    name, line = found[1], int(found[2])
    lines = text.split("\n")
    shown = lines[min(line, len(lines)) - 1].strip()
    said = log.strip(" \n\0")
    where = " in the kernel of the gradients of mod_args" if getattr(config, "wanted", ()) else ""
    return ValueError(f"{name} does not compile{where}: line {line}, {shown!r}. The compiler says:\n{said}")


def number_bits(x: int | float) -> int:
    """A number as it is passed in an address's place."""
    if isinstance(x, int):
        return x & 0xFFFFFFFFFFFFFFFF
    try:
        packed = struct.pack("<f", x)
    except OverflowError:
        packed = struct.pack("<f", math.copysign(math.inf, x))
    return int.from_bytes(packed, "little")

"""Random programs from a seed: expressions of known form, statements made of them, changes between calls."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from tests.fuzz.program import ARGUMENTS, CONTEXTS, LOCALS, ROWS, WIDTH, Block, Program, Statement

# {F} float [ROWS, WIDTH]; {V} float [WIDTH]; {S} 0-d tensor; {N} int of the host; {P} float of the host; {C} condition;
# {M} bool [ROWS]; {I} int64 [WIDTH] below ROWS; {A}, {B} variables that hold an {F}.
ATOMS: dict[str, Sequence[str]] = {
    "A": ("a", "b"),
    "F": (
        *("a", "a", "b", "x", "x", "y", "self.buf", "self.weight", "pair[0]", "self.last", "self.kv[:3]", "cache.keys[1:4]"),
        *("{A} * {P}", "{F} + {V}", "torch.tanh({F})", "{F}.relu()", "{F}.flip(0)", "{F}.t().contiguous().t()"),
        *("{F}.softmax(-1)", "self.lin({F})", "self.norm({F})", "torch.where({M}[:, None], {F}, {F})", "{F}.clone()"),
        *("{F}[{I}[:3]]", "weigh({F})", "weigh({F}, {P})", "inner({F})", "{F}.cumsum(0)", "{F}[:, -1:].expand(3, 4)"),
        *("{F}.bfloat16().float()", "{F}.roll({N}, 0)", "torch.cat([{F}[:, 2:], {F}[:, :2]], 1)", "self.drop({F})"),
        *("{F}.reshape(4, 3).t()", "{F} @ {F}.t() @ {F}", "{F}.view(-1).view(3, 4)", "torch.rand_like({F})", "{F}.sort(0)[0]"),
        *("torch.stack([{V}, {V}, {V}])", "{F}.masked_fill({M}[:, None], {P})", "self.blocks[{N} % 2]({F})", "{F}.detach()"),
        *(
            "({F} if {C} else {F})",
            "F.dropout({F}, 0.25, self.training)",
            "{F} * {S}",
            "{F} - {N}",
            "torch.randn(3, 4, device=x.device) * {P}",
        ),
        *("torch.randn(3, 4, generator=self.gen, device=x.device)", "{F}.index_select(0, {I}[:3])", "{F}.expand(2, 3, 4)[1]"),
    ),
    "V": (
        *(
            "v",
            "v",
            "x[0]",
            "self.bias",
            'pair[1]["b"]',
            "{F}.sum(0)",
            "{F}.mean(0)",
            "{F}[1]",
            "{F}[{N} % 3]",
            "self.kv[{N} % 8]",
        ),
        *(
            "{F}[{S}.long() % 3]",
            "self.kv[{S}.long() % 8]",
            "{F}[{M}].sum(0)",
            "{F}[: {N} % 4].sum(0)",
            "{F}.amax(0)",
            "{V} * {P}",
        ),
        *(
            "{F}[{M} & {M}].sum(0)",
            "{V}.cumsum(0)",
            "{F}[{F}.sum(1) > {P}].mean(0)",
            "torch.zeros(4, device=x.device)",
            "torch.full((4,), {P}, device=x.device)",
        ),
        *(
            "torch.tensor([{P}, 0.0, 1.0, 2.0], device=x.device)",
            "{F}[{M}.nonzero()[:, 0]].sum(0)",
            "torch.arange(4, device=x.device) * 0.5",
            "cache.keys[{N} % 8]",
        ),
        *("{F}[torch.where({M})[0]].sum(0)", "{F}.t()[:, 0]", "({V} if {C} else {V})", "{F}.var(0)", "{V}.sort()[0]"),
    ),
    "S": (
        *(
            "t",
            "t",
            "{F}.sum()",
            "{F}.mean()",
            "{F}.max()",
            "{V}[0]",
            "{V}.sum()",
            "x[0, 0]",
            "self.step",
            "{M}.sum()",
            "{F}[{N} % 3, 1]",
        ),
        *("{I}.max()", "{S} + 1", "{V}.argmax()", "torch.tensor({P}, device=x.device)", "{F}.norm()"),
    ),
    "N": (
        *("int(t)", "int(t)", "t.item()", "n", "n", "self.count", "len(self.items)", "q", "1", "2", 'LIMITS["n"]', "x.shape[0]"),
        *(
            "int({S})",
            "int({M}.sum())",
            "self.box.pos",
            "len(self.seen)",
            "ORDER[0]",
            "cache.position",
            "{I}[0].item()",
            "x.stride(0)",
        ),
        *(
            "int({F}.argmax()) % 3",
            "len(self.blocks)",
            "({N} + {N})",
            "abs({N})",
            "max({N}, 1)",
            "min({N}, 3)",
            "x.dim()",
            "self.lin.out_features",
        ),
        *("int(torch.randint(4, ()))", "len({M}.nonzero())", "x.storage_offset()", "len(ORDER)"),
    ),
    "P": (
        *(
            "w",
            "0.5",
            "2.0",
            "self.scale",
            "self.scale",
            "SCALE",
            'self.table["s"]',
            "self.items[-1]",
            "self.items[0]",
            "float({S})",
        ),
        *(
            "{S}.item()",
            'getattr(x, "factor", 1.0)',
            "self.offset",
            'LIMITS["low"]',
            "sum(self.items)",
            "weigh(2.0)",
            "inner(0.5)",
        ),
        *(
            "self.norm.eps",
            "self.drop.p",
            "random.random()",
            "({P} if {C} else {P})",
            "float({N})",
            "round({P}, 1)",
            "{V}.tolist()[1]",
        ),
        *("self.box.gain", "{N} / 3", "max(self.items)", "torch.get_default_dtype().itemsize"),
    ),
    "C": (
        *(
            "{F}.sum() > 0",
            "{F}.sum() > {P}",
            "int(t) > 1",
            "t.item() == 2",
            "{M}.any()",
            "bool({M}.all())",
            "x[0, 0] > {S}",
            "{S} > {P}",
        ),
        *(
            "self.flag",
            "self.count % 2 == 0",
            "n > 2",
            "{N} > {N}",
            "keep",
            'self.table["on"]',
            "SCALE > 1",
            "self.training",
            "t in (1, 3)",
        ),
        *(
            "x.is_contiguous()",
            "x is y",
            "torch.is_grad_enabled()",
            "len(self.items) > 2",
            "not {C}",
            "{C} and {C}",
            "{C} or {C}",
        ),
        *(
            "x.requires_grad",
            "torch.is_autocast_enabled()",
            "{F}.isnan().any()",
            "0 < {S} < 2",
            "torch.is_inference_mode_enabled()",
        ),
        *(
            "float({S}) > 0.5",
            "{V}.max() > {V}.min() + {P}",
            "torch.equal({F}, {F})",
            "torch.allclose({V}, {V})",
            "type(x) is nn.Parameter",
        ),
        *("self.scale > 1", "self.last is not None", "x.data_ptr() == y.data_ptr()", "{V}[0] > {V}[1]", "hasattr(x, 'factor')"),
    ),
    "M": (
        *(
            "m",
            "m",
            "{F}.sum(1) > 0",
            "{F}[:, 0] > {V}[0]",
            "~{M}",
            "{F}.amax(1) > {P}",
            "torch.arange(3, device=x.device) < {S}",
            "torch.arange(3, device=x.device) < {N}",
        ),
        *("{M} & {M}", "{M} | {M}", "{F}.isfinite().all(1)", "{I}[:3] == {N} % 3", "{I}[:3] == t"),
    ),
    "I": ("idx", "idx", "{F}.argmax(0)", "{F}.argsort(0)[1]", "idx.flip(0)", "({I} + {N}) % 3", "({I} + {S}.long()) % 3"),
}
STATEMENTS = (
    *("{A} = {F} * {P} + {F}", "{A} = {F}", "{A} = {F} + {F}", "{A} = {A} + {V}", "v = {V}", "v = v + {V}"),
    *("{A} = {F} * {S}", "w = {P}", "q = {N} % 4", "w = w * {P}", "{A} = {A} * w", "{A} = {F} - q", "v = {V} * {S}"),
    *("{A} = torch.tanh({A})", "self.buf.add_({F})", "self.buf.copy_({F})", "self.kv[{N} % 8] = {V}"),
    *("self.kv[{S}.long() % 8] = {V}", "self.buf[{M}] = {P}", "self.buf.mul_({P})", "self.step.add_(1)"),
    *("self.kv[: {N} % 4] = {V}", "self.buf[:, 1].zero_()", "{A}.mul_({P})", "{A}.add_({F})", "x.mul_({P})", "y.add_({F})"),
    *("x[:, 1].zero_()", "pair[0].copy_({F})", "cache.keys[{N} % 8] = {V}", "{A}[{M}] = {F}[{M}]", "cache.keys.add_({P})"),
    *("self.buf.index_add_(0, {I}[:3], {F})", "{A} = {F}[{N} % 3] + {F}", "v = {F}[{N} % 3] * {P} + {F}[{N} % 3]"),
    *("v = {F}[{M}].sum(0) + {F}[{M}].sum(0)", "v.add_({V})", "{A} = self.lin({F})", "{A} = self.norm({A})"),
    *("{A} = weigh({F}, {P}, plus={P})", "{A} = F.dropout({F}, 0.5)"),
    *("v = torch.stack([{V} for _ in range(max({N} % 4, 1))]).sum(0)", "{A} = {F}; v = {V}", "{A}, v = {F}, {V}"),
    *("torch.add({F}, {F}, out=self.buf)", "{A} = torch.bernoulli({F}.sigmoid())"),
    *("{A} = torch.from_numpy({F}.detach().float().cpu().numpy()).to(x.device)", "v = torch.stack(list({F})).sum(0)"),
    *("v = torch.tensor({V}.tolist(), device=x.device)", "{A} = torch.stack([{F}[k] for k in ORDER[:3]])"),
    "{A} = torch.stack([row * {P} for row in {F}])",
    "v = torch.repeat_interleave({F}, torch.tensor([1, 2, 0], device=x.device), 0).sum(0)",
    *("v = torch.repeat_interleave({F}, {I}[:3], 0).sum(0)", "v = {F}[{I}.unique()].sum(0)"),
    *("v = torch.bincount({I}, minlength=4) * {P}", "with torch.no_grad():\n    self.weight.mul_({P})"),
    *("{A} = {A}.to(torch.float16).float()", "del {A}\n{A} = {F}"),
)  # fmt: skip
PYTHON = (
    *("self.step += {N}", "cache.position += 1", "cache.position = {N} % 8", "self.last = {F}", "self.count += 1"),
    *("self.scale = self.scale * 0.5", "self.flag = not self.flag", "self.seen.append({N} % 4)", "self.last = {A}.clone()"),
    *('self.table["s"] = {P}', "self.items.append({P})", "self.items[0] = {P}", "self.box.pos = {N} % 3"),
    *("self.box.gain = {P}", "self.buf = {F}", "x.factor = {P}", "ORDER.append({N} % 3)", "torch.manual_seed({N})"),
    *("self.weight.data = {F}", "self.buf.data = {F}"),
)  # fmt: skip
"""Statements that leave something behind in Python: most steps that hold one are not recorded."""
HEADERS = (
    *("if {C}:", "if {C}:", "if {C}:", "if {C}: else", "if {C}: else", "if {C}: else", "if {C}: elif {C}: else", "for j in range({N} % 4):"),
    *("for row in {F}:", "for k in ORDER[:4]:", "for block in self.blocks:", "with torch.no_grad():", "with torch.autocast(x.device.type, torch.bfloat16):"),
    *("for k in {M}.nonzero()[:, 0]:", "for k in {I}.tolist():", "while turn < {N} % 4:", "with torch.inference_mode():", "for k, item in enumerate(self.items[:3]):"),
    *("try:", "for k in {I}.unique():", "with torch.enable_grad():"),
)  # fmt: skip
INNER = {
    "for j": ("{A} = {A} + {F}[j % 3]", "v = v * 0.5 + j", "self.kv[j] = {V}", "q = q + j", "if {C}: break"),
    "for row": ("v = v + row", "{A} = {A} * row", "if row.sum() > {P}: v = v + row"),
    "for k in": ("v = v + {F}[k % 3]", "self.kv[k] = {V}", "{A} = {A} + k", "q = q + int(k)"),
    "for block": ("{A} = block({A})",),
    "for k, item": ("{A} = {A} * item + k",),
}
RESULTS = (
    *("{A}", "{F}", "{F}, v", "{A}, {B}", '{{"out": {A}, "v": v}}', "[{A}, {V}]", "{A}, {N}", "{A}, {P}", "{F}.t()", "self.buf", "{A}[:, :2]"),
    *("self.kv[:2]", "x", "{A}, {A}", "{S}", "{A}.view(-1)", "({A}, [v, ({V},)])", "{F}[{M}]", "None", "{A}, self.count", "y, {A}", "cache, {A}", "{F}.bfloat16()"),
    *("{A}, {C}", "{F}.tolist()", "(self.last, {A})", "{A}.expand(2, 3, 4)", "torch.Size([{N}]), {A}", "{A}.argmax(-1)", "iter([{A}])", "{S}, self.table"),
)  # fmt: skip
CHANGES = (
    *("step.scale = 3.0", "step.scale = step.scale + 0.5", "step.flag = not step.flag", "step.items.append(4.0)", "step.items[0] = -1.0", "step.items = [1.0]"),
    *('step.table["s"] = 2.5', 'step.table["on"] = not step.table["on"]', "step.box.gain = 3.0", "step.box.pos = 2", "step.count = 5", "step.last = None"),
    *('space["SCALE"] = -1.0', 'space["LIMITS"]["n"] = 3', 'space["LIMITS"]["low"] = 0.5', 'space["ORDER"].reverse()', "step.train(not step.training)"),
    *("step.weight.data = noise(7, 3, 4)", "step.weight = nn.Parameter(noise(8, 3, 4))", "with torch.no_grad(): step.weight.mul_(2)", "step.buf = noise(9, 3, 4)"),
    *("step.buf.data = noise(10, 3, 4)", "step.buf.zero_()", "step.kv.fill_(1.0)", "step.lin.weight.data = noise(11, 4, 4)", "step.lin.bias = None", "step.norm.eps = 0.5"),
    *("step.lin = nn.Linear(4, 4).to(DEVICE)", "step.drop.p = 0.0", "step.lin.register_forward_hook(lambda m, i, o: o * 2)", "step.lin.forward = torch.tanh", "step.blocks.append(nn.ReLU())"),
    *('space["weigh"].__defaults__ = (2.0,)', 'space["weigh"].__kwdefaults__["plus"] = 1.0', 'space["inner"] = space["make"](3.0)', "Step.offset = 2.0", "step.offset = -2.0"),
    *("torch.manual_seed(5)", "step.gen.manual_seed(9)", 'space["CACHE"].position = 3', 'space["CACHE"].keys = noise(12, 8, 4)', "step.load_state_dict({k: v + 1 for k, v in step.state_dict().items()})"),
    *("step.norm.register_forward_pre_hook(lambda m, i: (i[0] + 1,))", "step.blocks[0] = nn.Sigmoid()", "step.seen.clear()", 'space["inner"].__closure__[0].cell_contents = 4.0', "step.norm.weight.data.fill_(2.0)"),
    *("step.blocks[1].forward = lambda v: v * 3", "step.buf.resize_(3, 4).fill_(2.0)", "step.requires_grad_(False)", "random.seed(4)", "step.lin.weight.data.mul_(-1)"),
    *("step.weigh = 1", "step.lin.double().float()", "step.register_buffer('buf', noise(13, 3, 4))", "Step.forward.__defaults__ = None", "space['weigh'] = lambda v, by=3.0, plus=0: v * by"),
)  # fmt: skip
VARIANTS: dict[str, Sequence[str]] = {
    "x": (
        *("noise(i, 4, 3).t()", "noise(i, 5, 4)[1:4]", "noise(i, 3, 8)[:, ::2]", "noise(i, 1, 4).expand(3, 4)", "noise(i, 3 + i % 2, 4)"),
        *("noise(i, 3, 4) if i % 4 else noise(i, 4, 3).t()", "nn.Parameter(noise(i, 3, 4))", "noise(i, 3, 4).double()", "noise(i, 3, 4).bfloat16()"),
        *("torch.zeros(3, 4).to(DEVICE) + i % 3", "noise(i, 2, 3, 4)[1]", "FIXED", "noise(i, 3, 4).requires_grad_(i > 4)"),
    ),
    "y": ("x", "x[:]", "x + 1", "x.detach()", "noise(i, 4).expand(3, 4)", "noise(i, 4, 3).t()", "x if i > 3 else noise(i, 3, 4)"),
    "t": ("torch.tensor(i % 3).to(DEVICE)", "torch.tensor(float(i % 4)).to(DEVICE)", "torch.tensor([i % 4]).to(DEVICE)[0]", "torch.tensor(i // 3).to(DEVICE)", "torch.tensor(2)"),
    "n": ("3", "i", "i % 3", "1 + (i > 3)", "float(i % 2)", "True"),
    "m": ("noise(i, 3) > 2", "noise(i, 3) < 2", "noise(i, 3, 2)[:, 0] > 0"),
    "keep": ("i > 4", "i % 2 == 0", "True"),
    "pair": ('[x, {"b": x[0]}]', '(noise(i, 3, 4), {"b": noise(i + 1, 4)})'),
}  # fmt: skip


class Grammar:
    """Programs out of one random generator."""

    def __init__(self, draws: random.Random) -> None:
        self.draws = draws

    def program(self) -> Program:
        """A program of up to some ten statements."""
        draws = self.draws
        body = self.body(draws.choice((1, 2, 2, 3, 3, 4, 5)), 0)
        result = self.text(draws.choice(RESULTS), 2)
        written = [name for name in LOCALS if re.search(rf"\b{name}\b", str(body))]
        if draws.random() < 0.75:  # else some of what the body computes would be of no use to anyone
            result = ", ".join([f"({result})", *written])
        calls = draws.randint(6, 12)
        changes = [(draws.randint(2, calls - 1), draws.choice(CHANGES)) for _ in range(draws.choice((0, 0, 1, 2)))]
        told = " ".join(map(repr, (body, result)))
        related = [line for line in CHANGES if (name := re.search(r"(?:step\.|space\[['\"])(\w+)", line)) and name[1] in told]
        changes += [(draws.randint(2, calls - 1), draws.choice(related)) for _ in range(draws.choice((0, 1, 2))) if related]
        names = [name for name in VARIANTS if draws.random() < 0.35]
        arguments = [(name, draws.choice(VARIANTS[name])) for name in names]
        return Program(body, result, tuple(arguments), tuple(sorted(changes)), self.contexts(), calls)

    def contexts(self) -> tuple[str, ...]:
        """Mostly one; at times they take turns."""
        if self.draws.random() < 0.1:
            return tuple(self.draws.choice(list(CONTEXTS)) for _ in range(self.draws.randint(2, 3)))
        return (self.draws.choices(list(CONTEXTS), weights=(5, 5, 1, 1, 2))[0],)

    def body(self, size: int, depth: int) -> tuple[Statement, ...]:
        """Statements, a third of them compound."""
        return tuple(self.block(depth) if depth < 2 and self.draws.random() < 0.35 else self.simple() for _ in range(size))

    def simple(self) -> str:
        """A statement of one line."""
        return self.text(self.draws.choice(PYTHON if self.draws.random() < 0.1 else STATEMENTS), 2)

    def block(self, depth: int) -> Block:
        """A compound statement; loops hold one statement about what they go over."""
        header = self.draws.choice(HEADERS)
        if header == "try:":
            handler = ("except (RuntimeError, ValueError, IndexError):", (self.simple(),))
            raising = self.text("if {C}: raise ValueError('refused')", 1)
            return Block((("try:", (*self.body(1, depth + 1), raising)), handler))
        parts = []
        for number, part in enumerate(header.replace(": el", ":\nel").split("\n")):
            inner = list(self.body(self.draws.randint(1, 2), depth + 1))
            for start, lines in INNER.items():
                if part.startswith(start):
                    inner.append(self.text(self.draws.choice(lines), 1))
            if part.startswith("while"):
                inner.append("turn += 1")
            parts.append((self.text(part if part.endswith(":") else part + ":", 1), tuple(inner)))
            assert number < 3
        return Block(tuple(parts))

    def text(self, form: str, depth: int) -> str:
        """``form`` with its placeholders filled; atoms without placeholders once ``depth`` is used up."""

        def fill(found: re.Match[str]) -> str:
            kind = found[1]
            choices = ATOMS["A" if kind == "B" else kind]
            plain = [atom for atom in choices if "{" not in atom.replace("{{", "")]
            made = self.text(self.draws.choice(choices if depth > 0 and self.draws.random() < 0.6 else plain), depth - 1)
            return f"({made})" if re.search(r"[ ~]", _without_brackets(made)) else made

        return re.sub(r"(?<!\{)\{([A-Z])\}", fill, form).replace("{{", "{").replace("}}", "}")


def _without_brackets(text: str) -> str:
    """``text`` without what stands in brackets, which binds tightest."""
    before = ""
    while before != text:
        before, text = text, re.sub(r"\([^()\[\]{}]*\)|\[[^()\[\]{}]*\]|\{[^()\[\]{}]*\}", "", text)
    return text


def generate(seed: int) -> Program:
    """The program of a seed."""
    return Grammar(random.Random(seed)).program()


assert set(VARIANTS) <= set(ARGUMENTS) and (ROWS, WIDTH) == (3, 4)

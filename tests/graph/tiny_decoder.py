"""A decoder by the graph contract in the operators that PyTorch's exporter leaves, from ONNX text.

It is put together from text so that the pass tests need not trace a model.

B batch, S new tokens, T capacity, H query heads, N key/value heads, D head size, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from tests.quantisation import to_nearest

from echoatt_runtime.contract import (
    DTYPES,
    SharingPlan,
    SourceCheckpoint,
    Specification,
    lay_out_caches,
)

HEADER = '<ir_version: 10, opset_import: ["" : 24, "com.microsoft" : 1]>\n'


def model_from_text(text: str, weights: Mapping[str, np.ndarray] | None = None) -> ir.Model:
    """A model from ONNX text, shapes inferred; inputs named in `weights` become initializers."""
    proto = onnx.parser.parse_model(HEADER + text)
    proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    model = ir.from_proto(proto)
    for value in list(model.graph.inputs):
        if weights is not None and value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            model.graph.register_initializer(value)
    return model


@dataclass(frozen=True)
class Decoder:
    """A decoder by the contract, in the operators that PyTorch's exporter leaves.

    `layout` is how query, key and value are projected: "separate", "biased" (separate with biases),
    "packed" (one product, Slices), "split" (one product, a Split), "heads" (one product, a Split of
    each head's part). A layer in `followers` reads its source's probabilities from the start.
    """

    sources: Sequence[int] = (0, 1, 2, 3)
    followers: Sequence[int] = ()
    layout: str = "separate"
    hidden: int = 16
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 4
    vocab: int = 11
    kv_heads_of: Mapping[int, int] | None = None
    capacity_from: str = "past_key_values.0.value"

    def build(self) -> ir.Model:
        rng = np.random.default_rng(5)
        D, C = self.head_dim, self.hidden
        weights: dict[str, np.ndarray] = {}

        def weight(name: str, *shape: int) -> str:
            weights[name] = (rng.standard_normal(shape) * 0.4).astype(np.float32)
            return f"float[{','.join(map(str, shape))}] {name}"

        declared = [weight("embed", self.vocab, C), weight("head", C, self.vocab)]
        weights["inv_freq"] = (0.1 ** np.arange(D // 2)).astype(np.float32)
        declared += [f"float[{D // 2}] inv_freq", weight("final_norm", C)]
        inputs = [
            "int64[batch,seq] input_ids",
            "int64[batch] past_lengths",
            "int64[batch,n] logits_indices",
        ]
        outputs = [f"float[batch,n,{self.vocab}] logits"]
        axis = 2 if self.capacity_from.endswith("key") else 3
        prelude = _PRELUDE.replace("AXIS", str(axis)).replace("END", str(axis + 1))
        body = [prelude.replace("CAPACITY", _quote(self.capacity_from))]
        for layer in range(len(self.sources)):
            N = (self.kv_heads_of or {}).get(layer, self.kv_heads)
            caches = {
                "key": f"float[batch,{N},capacity,{D}]",
                "value": f"float[batch,{N},{D},capacity]",
            }
            if layer in self.followers:
                del caches["key"]
            inputs += [
                f'{type_} "past_key_values.{layer}.{kind}"' for kind, type_ in caches.items()
            ]
            outputs += [f'{type_} "present.{layer}.{kind}"' for kind, type_ in caches.items()]
            body.append(self._layer(layer, N, weight, declared))
        body.append(
            _norm(f"x{len(self.sources)}", "final_norm", "last")
            + "wide = Unsqueeze(logits_indices, two)\n"
            "full = Concat<axis=0>(dim_b, dim_n, hidden_size)\nindex = Expand(wide, full)\n"
            "wanted = GatherElements<axis=1>(last, index)\nlogits = MatMul(wanted, head)\n"
        )
        text = (
            f"decoder ({', '.join(inputs + declared)}) => ({', '.join(outputs)})\n"
            f"<{_constants(self)}>\n{{\n{''.join(body)}}}"
        )
        return model_from_text(text, weights)

    def _layer(self, layer: int, N: int, weight: Callable[..., str], declared: list[str]) -> str:
        H, D, C = self.query_heads, self.head_dim, self.hidden
        p = f"l{layer}_"
        names = {
            n: f'"model.layers.{layer}.self_attn.{n}_proj.weight"' for n in ("q", "k", "v", "o")
        }
        follower = layer in self.followers
        sizes = {"q": H * D, "k": N * D, "v": N * D}
        plain = {k: v.strip('"') for k, v in names.items()}
        declared += [weight(f"{p}norm1", C), weight(f"{p}norm2", C)]
        declared.append(weight(plain["o"], H * D, C).replace(plain["o"], names["o"]))
        declared += [
            weight(f"{p}up", C, 2 * C),
            weight(f"{p}gate", C, 2 * C),
            weight(f"{p}down", 2 * C, C),
        ]
        text = _norm(f"x{layer}", f"{p}norm1", f"{p}h")
        wanted = ("v",) if follower else ("q", "k", "v")
        if self.layout in ("separate", "biased"):
            for n in wanted:
                declared.append(weight(plain[n], C, sizes[n]).replace(plain[n], names[n]))
                out = f"{p}{n}0" if self.layout == "biased" else f"{p}{n}"
                text += f"{out} = MatMul({p}h, {names[n]})\n"
                if self.layout == "biased":
                    declared.append(weight(f"{p}{n}_bias", sizes[n]))
                    text += f"{p}{n} = Add({out}, {p}{n}_bias)\n"
            text += "".join(_to_heads(p, n, H if n == "q" else N) for n in wanted)
        else:
            total = sum(sizes.values())
            declared.append(weight(f"{p}qkv", C, total))
            declared.append(weight(f"{p}qkv_bias", total))
            text += f"{p}a0 = MatMul({p}h, {p}qkv)\n{p}a = Add({p}a0, {p}qkv_bias)\n"
            ends = np.cumsum([0, *sizes.values()])
            if self.layout == "packed":
                for n, begin, end in zip("qkv", ends, ends[1:], strict=False):
                    text += (
                        f"{p}{n}_b = Constant<value_ints=[{begin}]>()\n"
                        f"{p}{n}_e = Constant<value_ints=[{end}]>()\n"
                        f"{p}{n} = Slice({p}a, {p}{n}_b, {p}{n}_e, two, one)\n"
                    )
            elif self.layout == "split":
                text += (
                    f"{p}sizes = Constant<value_ints=[{H * D},{N * D},{N * D}]>()\n"
                    f"{p}q, {p}k, {p}v = Split<axis=-1>({p}a, {p}sizes)\n"
                )
            if self.layout == "heads":
                assert H == N
                text += (
                    f"{p}last = Constant<value_ints=[{3 * D}]>()\n"
                    f"{p}dims = Concat<axis=0>(dim_b, dim_s, minus_one, {p}last)\n"
                    f"{p}r = Reshape({p}a, {p}dims)\n{p}t = Transpose<perm=[0,2,1,3]>({p}r)\n"
                    f"{p}qh, {p}kh, {p}vh = Split<axis=3, num_outputs=3>({p}t)\n"
                )
            else:
                text += "".join(_to_heads(p, n, H if n == "q" else N) for n in "qkv")
        past, present = (f"{s}.{layer}." for s in ("past_key_values", "present"))
        value = _quote(f"{present}value")
        text += (
            f"{p}vt = Transpose<perm=[0,1,3,2]>({p}vh)\n"
            f'{value} = TensorScatter<axis=-1, mode="linear">'
            f"({_quote(past + 'value')}, {p}vt, past_lengths)\n"
            f"{p}vv = Transpose<perm=[0,1,3,2]>({value})\n"
        )
        if follower:
            probabilities = f"l{self.sources[layer]}_p"
        else:
            key = _quote(f"{present}key")
            text += "".join(_rotate(p, n) for n in "qk")
            text += (
                f'{key} = TensorScatter<axis=-2, mode="linear">'
                f"({_quote(past + 'key')}, {p}kr, past_lengths)\n"
                f"{p}qs = Mul({p}qr, scale)\n"
                f"{p}kv = Constant<value_ints=[{N}]>()\n"
                f"{p}qd = Concat<axis=0>(dim_b, {p}kv, minus_one, head_size)\n"
                f"{p}qg = Reshape({p}qs, {p}qd)\n"
                f"{p}kt = Transpose<perm=[0,1,3,2]>({key})\n{p}s = MatMul({p}qg, {p}kt)\n"
                f"{p}sd = Concat<axis=0>(dim_b, heads, dim_s, dim_t)\n"
                f"{p}s4 = Reshape({p}s, {p}sd)\n{p}sm = Add({p}s4, mask)\n"
                f"{p}p4 = Softmax<axis=-1>({p}sm)\n"
                f"{p}pd = Concat<axis=0>(dim_b, {p}kv, minus_one, dim_t)\n"
                f"{p}p = Reshape({p}p4, {p}pd)\n"
            )
            probabilities = f"{p}p"
        return text + (
            f"{p}c = MatMul({probabilities}, {p}vv)\n"
            f"{p}cd = Concat<axis=0>(dim_b, heads, dim_s, head_size)\n"
            f"{p}c4 = Reshape({p}c, {p}cd)\n"
            f"{p}ct = Transpose<perm=[0,2,1,3]>({p}c4)\n"
            f"{p}cw = Constant<value_ints=[0,0,{H * D}]>()\n{p}c3 = Reshape({p}ct, {p}cw)\n"
            f"{p}o = MatMul({p}c3, {names['o']})\n{p}x = Add(x{layer}, {p}o)\n"
            + _norm(f"{p}x", f"{p}norm2", f"{p}m")
            + f"{p}g = MatMul({p}m, {p}gate)\n{p}gs = Sigmoid({p}g)\n{p}ga = Mul({p}g, {p}gs)\n"
            f"{p}u = MatMul({p}m, {p}up)\n{p}gu = Mul({p}ga, {p}u)\n{p}d = MatMul({p}gu, {p}down)\n"
            f"x{layer + 1} = Add({p}x, {p}d)\n"
        )

    def specification(
        self, sources: Sequence[int] | None = None, dtype: str = "fp32", device: str = "cpu"
    ) -> Specification:
        plan = SharingPlan(tuple(self.sources if sources is None else sources))
        count = plan.num_layers
        kv_heads = tuple((self.kv_heads_of or {}).get(i, self.kv_heads) for i in range(count))
        head_dims = (self.head_dim,) * count
        element_type = DTYPES[dtype].compute.name
        return Specification(
            family="llama",
            plan=plan,
            layer_kinds=("full",) * count,
            sliding_window=None,
            query_heads=(self.query_heads,) * count,
            kv_heads=kv_heads,
            head_dims=head_dims,
            vocab_size=self.vocab,
            context_length=64,
            dtype=dtype,
            device=device,
            caches=lay_out_caches(plan, kv_heads, head_dims, element_type),
            bos_token_id=1,
            eos_token_ids=(2,),
            pad_token_id=None,
            source_checkpoint=SourceCheckpoint(name="tiny", sha256="0" * 64),
            quantisation=None if (bits := DTYPES[dtype].bits) is None else to_nearest(bits),
        )

    def feeds(self, tokens: int = 3) -> dict[str, np.ndarray]:
        """Two rows of a few tokens, behind 5 and 2 valid ones, in buffers of 12."""
        rng = np.random.default_rng(7)
        feeds: dict[str, np.ndarray] = {
            "input_ids": rng.integers(0, self.vocab, (2, tokens)),
            "past_lengths": np.array([5, 2]),
            "logits_indices": np.array([[2, 0], [1, 2]]) % tokens,
        }
        unshared = range(len(self.sources))
        for cache in self.specification(unshared).caches:
            feeds[cache.past_name] = rng.standard_normal(cache.shape(2, 12)).astype(np.float32)
        return feeds


def _quote(name: str) -> str:
    return f'"{name}"'


def _constants(decoder: Decoder) -> str:
    return ", ".join(
        [
            "int64[1] zero = {0}", "int64[1] one = {1}", "int64[1] two = {2}",
            "int64[1] three = {3}", "int64[1] minus_one = {-1}", "int64 first = {0}",
            "int64 step = {1}",
            "float exponent = {2.0}", "float epsilon = {0.00001}", "float visible = {0.0}",
            "float hidden = {-10000.0}",
            f"float scale = {{{decoder.head_dim**-0.5}}}",
            f"int64[1] heads = {{{decoder.query_heads}}}",
            f"int64[1] head_size = {{{decoder.head_dim}}}",
            f"int64[1] half = {{{decoder.head_dim // 2}}}",
            f"int64[1] hidden_size = {{{decoder.hidden}}}",
            "int64[1] end = {9223372036854775807}",
            # The shape of a Range cannot be inferred; PyTorch's exporter states it
            "int64[batch,seq] positions",
        ]
    )  # fmt: skip


_PRELUDE = """
dim_b = Shape<start=0, end=1>(input_ids)
dim_s = Shape<start=1, end=2>(input_ids)
dim_n = Shape<start=1, end=2>(logits_indices)
dim_t = Shape<start=AXIS, end=END>(CAPACITY)
seq_length = Squeeze(dim_s)
capacity_length = Squeeze(dim_t)
steps = Range(first, seq_length, step)
steps2 = Unsqueeze(steps, zero)
begin = Unsqueeze(past_lengths, one)
positions = Add(begin, steps2)
positions3 = Unsqueeze(positions, two)
slots = Range(first, capacity_length, step)
slots3 = Unsqueeze(slots, zero)
seen = LessOrEqual(slots3, positions3)
mask3 = Where(seen, visible, hidden)
mask = Unsqueeze(mask3, one)
positions_f = Cast<to=1>(positions3)
angles = Mul(positions_f, inv_freq)
angles2 = Concat<axis=-1>(angles, angles)
cos3 = Cos(angles2)
sin3 = Sin(angles2)
cos = Unsqueeze(cos3, one)
sin = Unsqueeze(sin3, one)
x0 = Gather(embed, input_ids)
"""


def _norm(x: str, weight: str, out: str) -> str:
    return (
        f"{out}_sq = Pow({x}, exponent)\n{out}_mean = ReduceMean<keepdims=1>({out}_sq, minus_one)\n"
        f"{out}_add = Add({out}_mean, epsilon)\n{out}_sqrt = Sqrt({out}_add)\n"
        f"{out}_inv = Reciprocal({out}_sqrt)\n{out}_n = Mul({x}, {out}_inv)\n"
        f"{out} = Mul({weight}, {out}_n)\n"
    )


def _to_heads(p: str, n: str, heads: int) -> str:
    return (
        f"{p}{n}_dims = Constant<value_ints=[0,0,{heads},-1]>()\n"
        f"{p}{n}4 = Reshape({p}{n}, {p}{n}_dims)\n{p}{n}h = Transpose<perm=[0,2,1,3]>({p}{n}4)\n"
    )


def _rotate(p: str, n: str) -> str:
    x = f"{p}{n}h"
    return (
        f"{x}_lo = Slice({x}, zero, half, three, one)\n{x}_hi = Slice({x}, half, end, three, one)\n"
        f"{x}_neg = Neg({x}_hi)\n{x}_turn = Concat<axis=-1>({x}_neg, {x}_lo)\n"
        f"{x}_a = Mul({x}, cos)\n{x}_b = Mul({x}_turn, sin)\n{p}{n}r = Add({x}_a, {x}_b)\n"
    )

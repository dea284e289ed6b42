"""A CUDA device played on the CPU: finds mixed devices, hidden waits and graphs that freeze what should change; proves nothing about cuDNN or speed.

`with mock_cuda() as gpu:` makes `cuda:0` appear. Its tensors are CPU tensors whose storage carries a mark, so Parameters, subclasses, views and autograd
behave as always; `Tensor.device` reads the mark, and a dispatch mode looks at every aten operator, those of backward too. What it holds to, as CUDA does:
- tensors of two devices never meet (0-dim CPU tensors may join pointwise operators, CPU indices may index), and NumPy cannot see a CUDA tensor;
- CUDA draws take CUDA generators, whose state is 16 bytes (seed, offset); the global CUDA generator is another than the CPU's;
- a capture runs nothing: what was there before is put back after it, what it allocated is filled with NaN. It refuses to wait for the device, to copy from or
  to the host, and to draw from generators that are not registered; a failed one leaves its generators unusable. CPU scalars and Python numbers are frozen;
- a replay runs the recorded operators on the recorded memory and no Python; it fails when nobody but the graph holds memory it read (freed on a GPU).
- graphs that draw from one state of chance are replayed on one stream, or on streams that wait for each other;
- a norm without weight has no gradient of the weight or the shift to ask for.
What it cannot show: numbers of CUDA kernels, kernels that CUDA lacks or that differ (cuDNN), the order of streams, memory, time. Autocast is the CPU's bfloat16.
Operators' C++ shortcuts that make a CPU tensor in backward count as made on the device.
"""
import contextlib, itertools, random, struct, weakref
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

CPU, GPU, Base, CGenerator = torch.device("cpu"), torch.device("cuda", 0), torch._C.TensorBase, torch._C.Generator
DEVICE = Base.device.__get__
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount",
         "_linalg_svd", "linalg_eigh")


# ---- the mark

def storage(t):
    "Storage of a tensor, or None where it has none."
    while is_functorch_wrapped_tensor(t): t = get_unwrapped(t)
    with torch._C.DisableTorchFunctionSubclass():
        try: return Base.untyped_storage(t)
        except (NotImplementedError, RuntimeError): return None

def is_marked(t): return getattr(storage(t), "mock_cuda", False)

def mark(t):
    s = storage(t)
    if s is not None: s.mock_cuda = True
    return t

def device_of(t):
    real = DEVICE(t)
    return GPU if real.type == "cpu" and is_marked(t) else real

def tensors(*nests): return [t for t in tree_flatten(nests)[0] if isinstance(t, torch.Tensor)]


# ---- chance

class Anything(type(CGenerator)):
    def __instancecheck__(cls, x): return isinstance(x, CGenerator)

class State:
    "Seed and offset, as CUDA's Philox generator has them; several generators, and graphs, can hold one."
    def __init__(self): self.number, self.offset, self.graph, self.lost, self.stream = 67280421310721, 0, None, False, None

    def free(self, what):
        if self.graph: raise RuntimeError(f"Cannot call CUDAGeneratorImpl::{what} during CUDA graph capture.")
        return self
    def draw(self):
        "Offset of one operator's draws: from the start, in a capture from where its graph begins."
        if self.lost: raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        if Machine.now.graph is not self.graph: raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
        at = self.graph.drawn[self] if self.graph else self.offset
        if self.graph: self.graph.drawn[self] += 4
        else: self.offset += 4
        return at

class Generator(CGenerator, metaclass=Anything):
    "Each draw seeds a CPU generator from seed and offset."
    def __new__(cls, device="cpu"):
        if torch.device(device).type != "cuda": return CGenerator(device)
        self = CGenerator.__new__(cls, "cpu")
        self.state = State()
        Machine.now.generators[self._cdata] = weakref.ref(self)
        return self

    device = property(lambda self: GPU)
    def manual_seed(self, seed):
        state = self.state.free("set_current_seed")
        state.number, state.offset = int(seed) % 2**64, 0
        return self
    def seed(self): return self.manual_seed(random.getrandbits(53)).state.number
    def initial_seed(self): return self.state.number
    def get_offset(self): return self.state.offset
    def set_offset(self, n): self.state.free("set_offset").offset = n
    def get_state(self):
        state = self.state.free("get_state")
        return torch.frombuffer(bytearray(struct.pack("<Qq", state.number, state.offset)), dtype=torch.uint8)
    def set_state(self, new):
        if device_of(new) != CPU or new.dtype != torch.uint8: raise TypeError("RNG state must be a torch.ByteTensor")
        if new.numel() != 16: raise RuntimeError("RNG state is wrong size")
        state = self.state.free("set_state")
        state.number, state.offset = struct.unpack("<Qq", bytes(new.tolist()))
        return self
    def graphsafe_get_state(self):
        out = Generator("cuda")
        out.state = self.state
        return out
    def graphsafe_set_state(self, other): self.state = other.state

    def aim(self, number, at): CGenerator.manual_seed(self, hash((number, at)) % 2**63)


# ---- graphs

class Graph:
    "Stands for torch.cuda.CUDAGraph."
    def __init__(self, keep_graph=False): self.drawn, self.ops, self.kept, self.made, self.failed, self.whole = Counter(), [], {}, {}, False, False
    def register_generator_state(self, g):
        if not isinstance(g, CGenerator) or g.device != GPU: raise RuntimeError("Expected a 'cuda' device type for generator")
        self.drawn[g.state] = 0
    def pool(self): return (0, id(self))
    def reset(self): self.__init__()

    def capture_begin(self, *pool, capture_error_mode="global"):
        if Machine.now.graph: raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.drawn.setdefault(Machine.now.default.state, 0)
        for state in self.drawn: state.graph = self
        Machine.now.graph = self

    def capture_end(self):
        Machine.now.graph = None
        with _disable_current_modes(), torch.no_grad():
            for s,old in self.kept.items(): _bytes(s).copy_(old)
            for s in self.made: _bytes(s).fill_(255)
        for state in self.drawn: state.graph, state.lost = None, self.failed
        if self.failed: raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.held = Counter(storage(t) for op in self.ops for t in tensors(op[1:4]))
        self.kept, self.whole = dict.fromkeys(self.kept), True

    def touch(self, ts):
        "Keep what a tensor from before the capture holds."
        for t in ts:
            s = storage(t)
            if is_marked(t) and s not in self.made and s not in self.kept: self.kept[s] = _bytes(s).clone()

    def note(self, func, args, kwargs, out, at):
        "Record an operator with the memory it works on; CPU scalars as they are now."
        ins = {storage(t) for t in tensors(args, kwargs)}
        new = [t for t in tensors(out) if storage(t) not in ins]
        for t in new: self.made[storage(t)] = None
        if not func._schema.is_mutable and not new or func.__name__.split(".")[0] in ("empty", "empty_like", "new_empty", "empty_strided"): return
        hold = lambda t: (t.detach() if is_marked(t) else t.detach().clone()) if isinstance(t, torch.Tensor) else t
        self.ops.append((func, tree_map(hold, args), tree_map(hold, kwargs), tree_map(hold, out if new else None), at, ins))

    def replay(self):
        if not self.whole: raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        if Machine.now.graph: raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        freed = [s for s in self.kept if torch._C._storage_Use_Count(s._cdata) <= self.held[s] + 1]
        if freed: raise RuntimeError(f"mock: the graph uses memory that was freed since its capture ({sum(s.nbytes() for s in freed)} bytes)")
        with _disable_current_modes(), torch.no_grad():
            for func,args,kwargs,out,at,ins in self.ops:
                state, place, given = at or (None, 0, None)
                if given: given.aim(state.number, state.offset + place)
                with Machine.now.globally(state.number, state.offset + place) if at and not given else contextlib.nullcontext(): got = func(*args, **kwargs)
                if out is not None:
                    for old,new in zip(tensors(out), tensors(got)):
                        if storage(old) not in ins: old.copy_(new)
        for state,n in self.drawn.items():
            if n and state.stream and state.stream not in Machine.now.stream.follows: raise RuntimeError("mock: graphs at work on two streams draw from one state of chance")
            state.offset, state.stream = state.offset + n, Machine.now.stream
        Machine.now.replays += 1
        Machine.now.stream.works()

def _bytes(s): return torch.empty(0, dtype=torch.uint8).set_(s)

@contextlib.contextmanager
def graph(cuda_graph, pool=None, stream=None, **kw):
    "Stands for torch.cuda.graph."
    cuda_graph.capture_begin()
    try: yield
    except BaseException: cuda_graph.failed = True; raise
    finally: cuda_graph.capture_end()


# ---- the machine

def weightless(func, args, kwargs):
    "Is a norm's way back asked for gradients of a weight or shift it was not given? CUDA makes both as the weight is made, the CPU does not mind."
    given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
    return "weight" in given and given["weight"] is None and any(given.get("output_mask", ())[1:])

class Machine(TorchDispatchMode):
    "Looks at every operator: where its tensors are, whether it waits, what it draws."
    now = None
    def __init__(self):
        super().__init__()
        self.ops, self.graph, self.moving, self.sync, self.replays, self.generators, self.inside = Counter(), None, None, "default", 0, {}, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):     # under inference mode they arrive whole
            with self: return func.decompose(*args, **kwargs)
        ins, name = tensors(args, kwargs), func.__name__.split(".")[0]
        place = self.place(func, name, ins, args, kwargs)
        if place == GPU or any(map(is_marked, ins)):
            adds = name.lstrip("_").startswith("index_put") and (args[3] if len(args) > 3 else kwargs.get("accumulate", False))
            self.ops[func.__name__ + adds*" accumulate"] += 1
            self.check_wait(func, name, ins, args, place)
            if weightless(func, args, kwargs): raise RuntimeError(f"tensor does not have a device ({func.__name__}: no weight)")
        if self.graph: self.graph.touch(ins)
        out, at = self.drawn(func, args, kwargs, place)
        if place == GPU: [mark(t) for t in tensors(out)]
        if self.graph and (place == GPU or any(map(is_marked, ins))): self.graph.note(func, args, kwargs, out, at)
        return out

    def place(self, func, name, ins, args, kwargs):
        "Device of the result; tensors that cannot meet are refused."
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type == "cuda": kwargs["device"] = CPU
        if name == "_to_copy" and self.moving: return self.moving
        devices = [device_of(t) for t in ins]
        if name == "copy_": return devices[0]
        backward = torch._C._current_graph_task_id() != -1
        if asked is not None and not (torch.device(asked).type == "cpu" and backward):
            return GPU if torch.device(asked).type == "cuda" else torch.device(asked)
        if not ins: return self.last if backward else CPU
        if name in ("index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"): return self.indexed(devices, args)
        scalar = torch.Tag.pointwise in func.tags or name in ("fill_", "index_put_", "masked_fill", "masked_fill_", "lerp_", "copy")
        real = {d for t,d in zip(ins, devices) if not (scalar and t.dim() == 0 and d == CPU)} or {CPU}
        if len(real) > 1: raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (when checking {func})")
        self.last, = real
        return self.last

    def indexed(self, devices, args):
        at = {device_of(i) for i in args[1] if isinstance(i, torch.Tensor)}
        if devices[0] == CPU and GPU in at: raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if devices[0] == GPU and CPU in at: self.wait("indices copied from the host")
        if len(args) > 2 and args[2].dim() and device_of(args[2]) != devices[0]: raise RuntimeError("Expected all tensors to be on the same device (index_put_)")
        return devices[0]

    def check_wait(self, func, name, ins, args, place):
        masks = name.startswith(("index", "_index", "_unsafe_index")) and len(args) > 1 and isinstance(args[1], (list, tuple)) and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in tensors(args[1]))
        if masks or name in WAITS or func is torch.ops.aten.repeat_interleave.Tensor: self.wait(func.__name__)
        if name == "_to_copy" and ins and place != device_of(ins[0]) or name == "copy_" and device_of(args[0]) != device_of(args[1]): self.wait("copy between host and device")

    def wait(self, what):
        "The host waits for the device."
        if self.graph: raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        if self.sync == "error": raise RuntimeError(f"called a synchronizing CUDA operation ({what})")

    def drawn(self, func, args, kwargs, place):
        "Run an operator with the right source of chance -> (result, (generator, offset in the graph) or None)"
        if torch.Tag.nondeterministic_seeded not in func.tags and kwargs.get("generator") is None: return func(*args, **kwargs), None
        given = kwargs.get("generator")
        ref = self.generators.get(given._cdata) if given is not None else None
        g = ref and ref()
        if given is not None and (g is None) != (place != GPU):
            raise RuntimeError(f"Expected a '{place.type}' device type for generator but found '{'cpu' if g is None else 'cuda'}'")
        if place != GPU: return func(*args, **kwargs), None
        state = (g or self.default).state
        at = state.draw()
        told = (state, at, g) if self.graph else None
        start = state.offset + at if self.graph else at
        if g is not None:
            g.aim(state.number, start)
            return func(*args, **kwargs), told
        with _disable_current_modes(), self.globally(state.number, start): return func(*args, **kwargs), told

    @contextlib.contextmanager
    def on(self, stream):
        was, self.stream = self.stream, stream
        try: yield
        finally: self.stream = was

    @contextlib.contextmanager
    def globally(self, number, at):
        "Torch's own generator draws as CUDA's would at this offset, and is put back."
        old = torch.default_generator.get_state()
        torch.default_generator.manual_seed(hash((number, at)) % 2**63)
        try: yield
        finally: torch.default_generator.set_state(old)


# ---- what Python sees

BASE = {k: getattr(torch.Tensor, k) for k in ("to", "numpy", "tolist", "type_as")}
MAKE = {k: getattr(torch, k) for k in ("tensor", "as_tensor")}

def move(x, device, **kw):
    m = Machine.now
    was, m.moving = m.moving, GPU if device.type == "cuda" else device
    try: return BASE["to"](x, copy=True, **kw)
    finally: m.moving = was

def to(self, *args, copy=False, **kw):
    if args and isinstance(args[0], torch.Tensor): args = (args[0].device, args[0].dtype, *args[1:])
    if isinstance(kw.get("other"), torch.Tensor): other = kw.pop("other"); args = (other.device, other.dtype)
    device, dtype, nb, form = torch._C._nn._parse_to(*args, **kw)
    kw = {k: v for k,v in (("dtype", dtype), ("memory_format", form)) if v is not None}
    if device is None or device.type == device_of(self).type or device.type not in ("cpu", "cuda"):
        if device is not None and device.type not in ("cpu", "cuda"): kw["device"] = device
        return BASE["to"](self, copy=copy, **kw) if copy or kw else self
    return move(self, device, **kw)

def numpy(self, **kw):
    if is_marked(self): raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
    return BASE["numpy"](self, **kw)

def tolist(self): return BASE["tolist"](self.cpu() if is_marked(self) else self)

def made(kind):
    def make(data, *, dtype=None, device=None, **kw):
        device = None if device is None else torch.device(device)
        if isinstance(data, torch.Tensor):
            if kind == "tensor": data = data.detach().clone()
            return to(data, *[a for a in (device, dtype) if a is not None])
        found = [t for t in (data if isinstance(data, (list, tuple)) else ()) if isinstance(t, torch.Tensor) and is_marked(t)]
        if found: Machine.now.wait("numbers read from the device")
        grad = kw.pop("requires_grad", False)
        x = MAKE[kind](data, dtype=dtype, **({"device": device} if device and device.type not in ("cpu", "cuda") else {}), **kw)
        x = move(x, device) if device is not None and device.type == "cuda" else x
        return x.requires_grad_() if grad else x
    return make

def new_tensor(self, data, *, dtype=None, device=None, **kw): return torch.tensor(data, dtype=dtype or self.dtype, device=device or device_of(self), **kw)

ONE_HOT = torch.nn.functional.one_hot
def one_hot(x, num_classes=-1):
    "torch's makes its zeros in C++, where the mark is not seen."
    if not is_marked(x): return ONE_HOT(x, num_classes)
    return (x[..., None] == torch.arange(int(x.max()) + 1 if num_classes < 0 else num_classes, device=x.device)).long()

TENSOR = dict(device=property(device_of), is_cuda=property(lambda t: device_of(t).type == "cuda"), is_cpu=property(lambda t: device_of(t).type == "cpu"),
    get_device=lambda t: 0 if is_marked(t) else -1, to=to, numpy=numpy, tolist=tolist, new_tensor=new_tensor,
    cpu=lambda t, **kw: to(t, CPU, **kw), cuda=lambda t, device=None, **kw: to(t, GPU), type_as=lambda t, o: to(t, o.device, o.dtype),
    pin_memory=lambda t, *a: t, is_pinned=lambda t, *a: False)

def cloned(self):
    new = CLONE(self)
    if getattr(self, "mock_cuda", False): new.mock_cuda = True
    return new
CLONE = torch.UntypedStorage.clone

GROUP = torch._C._group_tensors_by_device_and_dtype
def grouped(lists, with_indices=False):
    "As torch's C++ function, by the device Python sees."
    out = {}
    for on in (CPU, GPU):
        rows = [i for i,t in enumerate(lists[0]) if device_of(t) == on]
        if not rows: continue
        for (_,dtype),(ls,idx) in GROUP([[l[i] for i in rows] if l else l for l in lists], with_indices).items(): out[on, dtype] = (ls, [rows[i] for i in idx])
    return out

class autocast(torch.autocast):
    def __init__(self, device_type, *args, **kw): super().__init__("cpu" if str(device_type).startswith("cuda") else device_type, *args, **kw)

COUNT = itertools.count(1)

class Stream:
    all, dealt = weakref.WeakSet(), Counter()
    def __init__(self, device=None, priority=0, **kw):
        self.device, self.device_index, self.follows, self.cuda_stream = GPU, 0, {self}, (priority, self.dealt[priority] % 32)     # CUDA has 32, and begins again
        self.dealt[priority] += 1
        self.all.add(self)
    def works(self):
        "Nobody has waited for what it does now."
        for other in self.all: other.follows -= {self} if other is not self else set()
    def wait_stream(self, other): self.follows |= other.follows
    def is_capturing(self): return Machine.now.graph is not None
    def synchronize(self): Machine.now.wait("Stream.synchronize")
    def record_event(self, e=None): return e or Event()
    def wait_event(self, e): pass

class Event:
    def __init__(self, **kw): self.t = 0.
    def record(self, stream=None): import time; self.t = time.perf_counter()
    def synchronize(self): Machine.now.wait("Event.synchronize")
    def query(self): return True
    def elapsed_time(self, other): return 1e3*(other.t - self.t)

def properties(device=None): return SimpleNamespace(name="mock CUDA device", total_memory=80*2**30, major=9, minor=0, multi_processor_count=132)

def cuda_api(m):
    "What torch.cuda becomes."
    return dict(is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, is_initialized=lambda: True, _lazy_init=lambda: None, init=lambda: None, _is_in_bad_fork=lambda: False,
        get_device_name=lambda d=None: "mock CUDA device", get_device_capability=lambda d=None: (9, 0), get_device_properties=properties, mem_get_info=lambda d=None: (60*2**30, 80*2**30),
        memory_allocated=lambda d=None: 0, max_memory_allocated=lambda d=None: 0, memory_reserved=lambda d=None: 0, max_memory_reserved=lambda d=None: 0, reset_peak_memory_stats=lambda d=None: None,
        empty_cache=lambda: None, synchronize=lambda d=None: m.wait("synchronize"), is_bf16_supported=lambda including_emulation=True: True, set_device=lambda d: None,
        Stream=Stream, Event=Event, current_stream=lambda d=None: m.stream, default_stream=lambda d=None: m.stream, stream=m.on,
        CUDAGraph=Graph, graph=graph, graph_pool_handle=lambda: (0, next(COUNT)), default_generators=(m.default,), is_current_stream_capturing=lambda: m.graph is not None, set_sync_debug_mode=lambda mode: setattr(m, "sync", mode),
        manual_seed=lambda s: m.default.manual_seed(s), manual_seed_all=lambda s: m.default.manual_seed(s), initial_seed=lambda: m.default.initial_seed(),
        get_rng_state=lambda d="cuda": m.default.get_state(), set_rng_state=lambda s, d="cuda": m.default.set_state(s) and None)

@contextlib.contextmanager
def mock_cuda():
    "`cuda:0` is there inside the block; yields the machine: `ops` counts operators on the device, `replays` graphs."
    _device_constructors()          # remembers torch.tensor as it is
    m = Machine.now = Machine()
    m.default, m.stream, m.last = Generator("cuda"), Stream(), CPU
    with contextlib.ExitStack() as stack:
        put = lambda where, name, new: stack.enter_context(patch.object(where, name, new, create=True))
        for k,v in TENSOR.items(): put(torch.Tensor, k, v)
        for k,v in cuda_api(m).items(): put(torch.cuda, k, v)
        for k in ("_cuda_endAllocateToPool", "_cuda_releasePool"): put(torch._C, k, lambda device, pool: None)
        for k in MAKE: put(torch, k, made(k))
        for where,name,new in ((torch, "Generator", Generator), (torch, "autocast", autocast), (torch.UntypedStorage, "clone", cloned), (torch._C, "_group_tensors_by_device_and_dtype", grouped),
                               (torch.backends.cuda, "is_built", lambda: True), (torch.nn.functional, "one_hot", one_hot), (torch.accelerator, "is_available", lambda: True), (torch.accelerator, "current_accelerator", lambda *a, **kw: torch.device("cuda")),
                               (torch.accelerator, "current_stream", lambda d=None: m.stream), (torch.accelerator, "current_device_index", lambda: 0)): put(where, name, new)
        stack.enter_context(m)
        try: yield m
        finally: Machine.now = m

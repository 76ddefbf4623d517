// Memory operations by name.
#include "ops_memory.h"

namespace emu::EMU_ISA {

template <class T, class... R>
void add_loads(std::vector<Named>& t, const std::string& type) {
  EMU_OP("ld." + type + ".32", (op_ld<T, u32>));
  EMU_OP("ldparam." + type + ".32", (op_ld_param<T, u32>));
  EMU_OP("ld." + type + ".64", (op_ld<T, u64>));
  EMU_OP("ldparam." + type + ".64", (op_ld_param<T, u64>));
  if constexpr (std::is_unsigned_v<T>) {
    EMU_OP("st." + type + ".32", (op_st<T, u32>));
    EMU_OP("st." + type + ".64", (op_st<T, u64>));
  }
}

inline u32 half_add_f16(u32 a, u32 b) { return h_add<Half>(a, b); }

void memory_ops(std::vector<Named>& t) {
  add_loads<u8>(t, "u8");
  add_loads<s8>(t, "s8");
  add_loads<u16>(t, "u16");
  add_loads<s16>(t, "s16");
  add_loads<u32>(t, "u32");
  add_loads<s32>(t, "s32");
  add_loads<u64>(t, "u64");
#define ATOM(name, T, ...) EMU_OP("atom." name, (op_atom<T, [](T a, T b) -> T { __VA_ARGS__; }>))
  ATOM("add.32", u32, return a + b);
  ATOM("add.64", u64, return a + b);
  ATOM("add.f32", float, return as_float(canonical(a + b)));
  ATOM("add.f64", double, return a + b);
  ATOM("min.u32", u32, return std::min(a, b));
  ATOM("min.s32", s32, return std::min(a, b));
  ATOM("max.u32", u32, return std::max(a, b));
  ATOM("max.s32", s32, return std::max(a, b));
  ATOM("min.u64", u64, return std::min(a, b));
  ATOM("min.s64", s64, return std::min(a, b));
  ATOM("max.u64", u64, return std::max(a, b));
  ATOM("max.s64", s64, return std::max(a, b));
  ATOM("and.32", u32, return a & b);
  ATOM("or.32", u32, return a | b);
  ATOM("xor.32", u32, return a ^ b);
  ATOM("and.64", u64, return a & b);
  ATOM("or.64", u64, return a | b);
  ATOM("xor.64", u64, return a ^ b);
  ATOM("exch.32", u32, (void)a; return b);
  ATOM("exch.64", u64, (void)a; return b);
  ATOM("inc.32", u32, return (a >= b) ? 0u : a + 1);
  ATOM("dec.32", u32, return (a == 0 || a > b) ? b : a - 1);
  ATOM("add.f16x2", u32, return add2<Half>(a, b));
  ATOM("add.bf16x2", u32, return add2<Brain>(a, b));
  ATOM("min.f16x2", u32, return (minmax2<Half, false>(a, b)));
  ATOM("max.f16x2", u32, return (minmax2<Half, true>(a, b)));
  ATOM("min.bf16x2", u32, return (minmax2<Brain, false>(a, b)));
  ATOM("max.bf16x2", u32, return (minmax2<Brain, true>(a, b)));
  ATOM("add.f16", u16, return u16(h_add<Half>(a, b)));
  ATOM("add.bf16", u16, return u16(h_add<Brain>(a, b)));
#undef ATOM
  EMU_OP("atom.cas.16", op_atom_cas<u16>);
  EMU_OP("atom.cas.32", op_atom_cas<u32>);
  EMU_OP("atom.cas.64", op_atom_cas<u64>);
#define RED(name, T, ...) \
  EMU_OP("redv." name, (op_red_vector<T, [](T a, T b) -> T { __VA_ARGS__; }>))
  RED("add.f32", float, return as_float(canonical(a + b)));
  RED("add.f16x2", u32, return add2<Half>(a, b));
  RED("add.bf16x2", u32, return add2<Brain>(a, b));
  RED("add.f16", u16, return u16(h_add<Half>(a, b)));
  RED("add.bf16", u16, return u16(h_add<Brain>(a, b)));
#undef RED
  EMU_OP("cvta", op_cvta);
  EMU_OP("cvta.32", op_cvta32);
  EMU_OP("isspacep", op_isspacep);
  EMU_OP("cp.async", op_cp_async);
  EMU_OP("cp.async.commit_group", op_cp_async_commit);
  EMU_OP("cp.async.wait_group", op_cp_async_wait);
  EMU_OP("cp.async.wait_all", op_cp_async_wait_all);
  EMU_OP("ldmatrix", op_matrix<false>);
  EMU_OP("stmatrix", op_matrix<true>);
}

}  // namespace emu::EMU_ISA

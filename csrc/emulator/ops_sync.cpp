// Operations between lanes, warps and blocks, and branches, by name.
#include "ops_sync.h"

namespace emu::EMU_ISA {

void sync_ops(std::vector<Named>& t) {
  EMU_OP("shfl.up", op_shfl<0>);
  EMU_OP("shfl.down", op_shfl<1>);
  EMU_OP("shfl.bfly", op_shfl<2>);
  EMU_OP("shfl.idx", op_shfl<3>);
  EMU_OP("vote.all", op_vote<0>);
  EMU_OP("vote.any", op_vote<1>);
  EMU_OP("vote.uni", op_vote<2>);
  EMU_OP("vote.ballot", op_vote<3>);
  EMU_OP("match.any.b32", (op_match<u32, false>));
  EMU_OP("match.all.b32", (op_match<u32, true>));
  EMU_OP("match.any.b64", (op_match<u64, false>));
  EMU_OP("match.all.b64", (op_match<u64, true>));
#define REDUX(name, T, ...) \
  EMU_OP("redux." name, (op_redux<T, [](T a, T b) -> T { return __VA_ARGS__; }>))
  REDUX("add.u32", u32, a + b);
  REDUX("add.s32", u32, a + b);
  REDUX("min.u32", u32, std::min(a, b));
  REDUX("max.u32", u32, std::max(a, b));
  REDUX("min.s32", s32, std::min(a, b));
  REDUX("max.s32", s32, std::max(a, b));
  REDUX("and.b32", u32, a & b);
  REDUX("or.b32", u32, a | b);
  REDUX("xor.b32", u32, a ^ b);
  REDUX("min.f32", float, f_min<false>(a, b));
  REDUX("max.f32", float, f_max<false>(a, b));
  REDUX("min.nan.f32", float, f_min<true>(a, b));
  REDUX("max.nan.f32", float, f_max<true>(a, b));
#undef REDUX
  EMU_OP("elect", op_elect);
  EMU_OP("activemask", op_activemask);
  EMU_OP("bar.warp", op_bar_warp);
  EMU_OP("barrier", op_barrier);
  EMU_OP("fence", op_fence);
  EMU_OP("fence.proxy", op_fence_proxy);
  EMU_OP("wgmma.fence", op_wgmma_fence);
  EMU_OP("wgmma.commit", op_wgmma_commit);
  EMU_OP("wgmma.wait", op_wgmma_wait);
  EMU_OP("wgmma.issue", op_wgmma_issue);
  EMU_OP("wgmma.touch", op_wgmma_touch);
  EMU_OP("wgmma.check_wait", op_wgmma_check_wait);
  EMU_OP("wgmma.check_fence", op_wgmma_check_fence);
  EMU_OP("mbarrier", op_mbarrier);
  EMU_OP("bra", op_bra);
  EMU_OP("brx", op_brx);
  EMU_OP("exit", op_exit);
  EMU_OP("trap", op_trap);
  EMU_OP("yield", op_yield);
  EMU_OP("clock.32", op_clock);
  EMU_OP("clock.64", op_clock64);
  EMU_OP("printf", op_printf);
  EMU_OP("assertfail", op_assertfail);
}

}  // namespace emu::EMU_ISA

// Sums over chunks, each in a slot of its own and in an order of its own: NOTE [chunks are fixed].
#pragma once

#include "table.cuh"

namespace fsam::cuda {

template <class S>
__device__ __forceinline__ S warp_sum(S x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = x + __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// Several sums over a warp at once. At each distance a lane keeps half of the sums and gives its partner the others, so
// a sum ends in some lanes instead of all; each is added up as warp_sum does, in which a + b and b + a are the same
// bits.
template <int kCount, class S>
__device__ __forceinline__ S warp_sums(const S (&sums)[kCount]) {
  S sum[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum[k] = sums[k];
  int count = kCount;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) {
      if (k >= count / 2) break;
      const S given = upper ? sum[2 * k] : sum[2 * k + 1];
      const S kept = upper ? sum[2 * k + 1] : sum[2 * k];
      sum[k] = kept + __shfl_xor_sync(kAllLanes, given, distance);
    }
    if (count % 2 != 0) {
      const S last = sum[count - 1];
      sum[count / 2] = last + __shfl_xor_sync(kAllLanes, last, distance);
    }
    count = (count + 1) / 2;
  }
  return sum[0];
}
// Which of the sums this lane has after warp_sums; -1 in all lanes but the first that has it.
template <int kCount>
__device__ __forceinline__ int sum_of_lane() {
  int which[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) which[k] = k;
  int count = kCount;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) {
      if (k < count / 2) which[k] = upper ? which[2 * k + 1] : which[2 * k];
    }
    if (count % 2 != 0) which[count / 2] = upper ? -1 : which[count - 1];
    count = (count + 1) / 2;
  }
  return which[0];
}

// The sums of a block's warps over their pieces, until the block adds them up: [chunk][sum][warp].
template <int kCount, class S>
struct BlockSums {
  static constexpr int kPerChunk = kCount * kWarps;
  S of[kMaxSpan * kPerChunk];
};

// kCount sums of the piece that a warp is at.
template <int kCount, class S>
struct PieceSums {
  using Block = BlockSums<kCount, S>;
  Block* block;
  int which = sum_of_lane<kCount>();
  int chunks = 0;  // pieces that are behind

  // To be called by all lanes, with what each has summed.
  __device__ __forceinline__ void end_piece(const S (&sums)[kCount]) {
    const S mine = warp_sums(sums);
    if (which >= 0) block->of[chunks * Block::kPerChunk + which * kWarps + threadIdx.x / kWarp] = mine;
    ++chunks;
  }

  // After the walk, by all threads: to[chunk * per_chunk + k * per_sum] of the chunks of this block, or of this warp's
  // row.
  template <class Rows>
  __device__ __forceinline__ void store(const Rows& table, const Piece& piece, const S (&sums)[kCount], S* to,
                                        int64_t per_chunk, int64_t per_sum) {
    S* slot = to + table.id[piece.row] * per_chunk;
    if (!piece.large) {
      const S mine = warp_sums(sums);
      if (which >= 0 && piece.n > 0) slot[which * per_sum] = mine;
      return;
    }
    const int first = (int(blockIdx.x) - table.first_block[piece.row]) * table.span;
    const int64_t left = (table.numel[piece.row] + kChunk - 1) / kChunk - first;
    const int count = left < table.span ? int(left) : table.span;  // chunks of this block
    end_piece(sums);
    if (which >= 0) {  // the row may end before this warp's piece of the last chunk
      const int place = which * kWarps + threadIdx.x / kWarp;
      for (; chunks < count; ++chunks) block->of[chunks * Block::kPerChunk + place] = 0;
    }
    __syncthreads();
    const int thread = threadIdx.x;
    if (thread >= count * kCount) return;
    const S* warps = block->of + thread * kWarps;
    S sum = warps[0];
    for (int i = 1; i < kWarps; ++i) sum = sum + warps[i];
    slot[thread % kCount * per_sum + (first + thread / kCount) * per_chunk] = sum;
  }
};

}  // namespace fsam::cuda

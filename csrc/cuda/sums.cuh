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

// The sums of a block's warps over their pieces, until the block adds them up.
template <int kCount, class S>
struct WarpSums {
  S of[kMaxSpan][kCount][kWarps];
};

// kCount sums of the piece that a warp is at. `chunks` pieces are behind.
template <int kCount, class S>
struct PieceSums {
  WarpSums<kCount, S>* block;
  int chunks = 0;

  // To be called by all lanes, with what each has summed.
  __device__ __forceinline__ void end_piece(const S (&sums)[kCount]) {
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const S sum = warp_sum(sums[k]);
      if (threadIdx.x % kWarp == 0) block->of[chunks][k][warp] = sum;
    }
    ++chunks;
  }

  // After the walk, by all threads: to[chunk * per_chunk + k * per_sum] of the chunks of this block, or of this warp's
  // row.
  template <class Rows>
  __device__ __forceinline__ void store(const Rows& table, const Piece& piece, const S (&sums)[kCount], S* to,
                                        int64_t per_chunk, int64_t per_sum) {
    const int thread = threadIdx.x, warp = thread / kWarp;
    S* slot = to + table.id[piece.row] * per_chunk;
    end_piece(sums);
    if (!piece.large) {
      if (thread % kWarp == 0 && piece.n > 0) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) slot[k * per_sum] = block->of[0][k][warp];
      }
      return;
    }
    const int first = (int(blockIdx.x) - table.first_block[piece.row]) * table.span;
    const int64_t left = (table.numel[piece.row] + kChunk - 1) / kChunk - first;
    const int count = left < table.span ? int(left) : table.span;  // chunks of this block
    if (thread % kWarp == 0) {  // the row has ended before this warp's pieces of the last one
      for (; chunks < count; ++chunks) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) block->of[chunks][k][warp] = 0;
      }
    }
    __syncthreads();
    if (thread >= count * kCount) return;
    const int chunk = thread / kCount, k = thread % kCount;
    S sum = block->of[chunk][k][0];
    for (int i = 1; i < kWarps; ++i) sum = sum + block->of[chunk][k][i];
    slot[k * per_sum + (first + chunk) * per_chunk] = sum;
  }
};

}  // namespace fsam::cuda

// What the layers need of a step, from the few numbers that come from the host. `inputs` is int32 and lies as
// worker/backends/cuda/step_inputs.py says. tables: [groups, max_rows + 1, max_blocks]; the last line of a group is
// the scratch slot of padded rows, whose tokens have no cache line.

// The line of a token in its group's cache, or -1.
__device__ __forceinline__ i64 cache_line(const int* tables, int group, int slot, int position, int max_rows,
                                          int max_blocks, int block_tokens) {
  if (slot == max_rows) return -1;
  const int* table = tables + (static_cast<i64>(group) * (max_rows + 1) + slot) * max_blocks;
  return static_cast<i64>(table[position / block_tokens]) * block_tokens + position % block_tokens;
}

// updates: [count, 4]: group, slot, index in the table, block. No two name the same place.
extern "C" __global__ void __launch_bounds__(256) change_tables(const int* updates, int* tables, int count,
                                                                int max_rows, int max_blocks) {
  let_next_start();
  wait_for_previous();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int* update = updates + static_cast<i64>(i) * 4;
  tables[(static_cast<i64>(update[0]) * (max_rows + 1) + update[1]) * max_blocks + update[2]] = update[3];
}

// Every row has one token, the last one sampled. inputs: slots [rows], starts [rows].
extern "C" __global__ void __launch_bounds__(256)
    decode_inputs(const int* inputs, const int* tables, const i64* last_tokens, i64* token_ids, i64* positions,
                  i64* lines, int* kv_lengths, int rows, int groups, int max_rows, int max_blocks,
                  int block_tokens) {
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const int slot = inputs[row], start = inputs[rows + row];
  token_ids[row] = last_tokens[slot];
  positions[row] = start;
  kv_lengths[row] = start + 1;
  for (int g = 0; g < groups; ++g)
    lines[static_cast<i64>(g) * rows + row] =
        cache_line(tables, g, slot, start, max_rows, max_blocks, block_tokens);
}

// inputs: slots [rows], starts [rows], q_starts [rows + 1], the tokens whose logits are wanted [logits], each
// token's row [tokens], each token's id [tokens], below 0: the row's last one sampled. A thread makes a token, a
// row and a wanted one.
extern "C" __global__ void __launch_bounds__(256)
    mixed_inputs(const int* inputs, const int* tables, const i64* last_tokens, i64* token_ids, i64* positions,
                 i64* lines, int* kv_lengths, i64* logit_tokens, int* logit_slots, int* logit_lengths, int rows,
                 int tokens, int logits, int groups, int max_rows, int max_blocks, int block_tokens) {
  let_next_start();
  wait_for_previous();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int *slots = inputs, *starts = slots + rows, *q_starts = starts + rows, *wanted = q_starts + rows + 1,
            *token_rows = wanted + logits, *ids = token_rows + tokens;
  auto kv_length = [&](int row) { return starts[row] + q_starts[row + 1] - q_starts[row]; };
  if (i < rows) kv_lengths[i] = kv_length(i);
  if (i < logits) {
    const int row = token_rows[wanted[i]];
    logit_tokens[i] = wanted[i];
    logit_slots[i] = slots[row];
    logit_lengths[i] = kv_length(row);
  }
  if (i >= tokens) return;
  const int row = token_rows[i], slot = slots[row], position = starts[row] + i - q_starts[row], id = ids[i];
  token_ids[i] = id < 0 ? last_tokens[slot] : id;
  positions[i] = position;
  for (int g = 0; g < groups; ++g)
    lines[static_cast<i64>(g) * tokens + i] =
        cache_line(tables, g, slot, position, max_rows, max_blocks, block_tokens);
}

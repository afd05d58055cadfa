#!/usr/bin/env bash
# MAP by training (arXiv 2410.19198) on HH-RLHF's prompts: one policy by PPO at a palette's multipliers, which are corrected until the targets are met.
# usage:    pipelines/map_training_hh.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# fetches:  meta-llama/Llama-2-7b-hf (its licence has to be accepted), Anthropic/hh-rlhf, two of Ray2333's GPT-2 rewards (about 20 GB)
# needs:    a GPU of 80 GB; not run here. An SFT of one epoch, 8,000 responses for the bank, then a training of at most 20,000 of 50 tokens
# expect:   a line per target with its level, and OUT/compare/report.html: one point, beside best-of-n of the same SFT model
# as there: rewards helpful and harmless; PPO on multipliers times rewards, with no other beta; 1e-6; 20 responses a batch; 50 tokens
# not as there: the multipliers are corrected by what the policy delivers (those of the bank to the end there); the bank has 16 responses of
#           each prompt and a dual per prompt (one response, and a pooled dual, there: it counts what lies between prompts as gains);
#           rewards are standardised; responses are drawn from all tokens (top 50 there); an SFT model in place of Llama-2-7B-chat
source "$(dirname "$0")/common.sh"
source "$here/hh_sft.bash"
if [ -n "$tiny" ]; then
  points=(--limit 4 --n_boot 50 --examples 1) tokens=8 bank=(--limit 8 --samples 6)
  ask='helpful>=+0.1sd harmless>=keep-0.1'
  loop=(--loop.rounds 3 --loop.prompts 4 --loop.samples 3 --loop.steps 2 --loop.lora.rank 2)
  map=(--map.every 1)
else
  points=(--limit 200) tokens=50 bank=(--limit 500 --samples 16)
  ask='helpful>=q60 harmless>=q60'
  loop=(--loop.rounds 250 --loop.prompts 20 --loop.samples 4 --loop.steps 4 --loop.lora.rank 64 --loop.lora.alpha 128
    --loop.fit.learning_rate 1e-6 --loop.fit.schedule constant --loop.fit.batch_size 5 --loop.fit.precision bfloat16)
  map=(--map.every 10)
fi
law=(--sampling.top_k 0 --sampling.allow_eos_first true --sampling.max_new_tokens "$tokens")

run sample --out "$out/bank" --model "$base" --prompts "$out/prompts/prompts.jsonl" --split train "${bank[@]}" "${law[@]}"
run score --run "$out/bank" --model "$base" --rewards "$rewards"
run normalise --run "$out/bank" --out "$out/statistics.json"
run train map --out "$out/map" --model "$base" --prompts "$out/prompts/prompts.jsonl" --rewards "$rewards" --bank "$out/bank" --ask "$ask" \
  --statistics "$out/statistics.json" --loop.sampling.max_new_tokens "$tokens" "${loop[@]}" "${map[@]}"
run compare --out "$out/compare" --model "$base" --prompts "$out/prompts/prompts.jsonl" --split test "${points[@]}" \
  --methods "{MAP: {policies: ['$out/map/adapter']}}" --rewards "$rewards" --judges '[]' \
  --samples 1 --reference_samples 2 --best_of '[2]' --sampling.max_new_tokens "$tokens"

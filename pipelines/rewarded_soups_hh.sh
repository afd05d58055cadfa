#!/usr/bin/env bash
# Rewarded soups (arXiv 2306.04488) on HH-RLHF's prompts, in the setting of Rewards-in-Context: helpful and harmless, 11 weights.
# usage:    pipelines/rewarded_soups_hh.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# fetches:  meta-llama/Llama-2-7b-hf (its licence has to be accepted), Anthropic/hh-rlhf, two of Ray2333's GPT-2 rewards (about 20 GB)
# needs:    a GPU of 80 GB; not run here. An SFT of one epoch, 40,000 samples of 128 tokens, two trainings
# expect:   OUT/compare/report.html: the soups' front beside that of factors averaged and of MOD; the soup should lie above the chord
#           between its ends, the claim of the paper
# as there: one SFT model, one policy per reward from it, weights summed afterwards at 11 weights, 200 test prompts, 128 tokens
# not as there: policies are trained by DPO on pairs of the SFT model's own samples, the best against the worst of 8 by each reward, where
#           the papers run PPO on the same reward; soups are exact sums of updates (averaged factors stand beside them, as in the
#           released code), and no number of ours is one of theirs
source "$(dirname "$0")/common.sh"
source "$here/hh_sft.bash"
if [ -n "$tiny" ]; then
  drawn=(--sampling.max_new_tokens 8) points=(--limit 4 --steps 2 --n_boot 50 --examples 1) samples=3 steps=2
  dpo=(--dpo.lora.rank 2 --dpo.max_length 128 --dpo.test_share 0.5 --dpo.fit.batch_size 4 --dpo.fit.max_steps 3)
else
  drawn=(--sampling.max_new_tokens 128) points=(--limit 200 --steps 10) samples=8 steps=10
  dpo=(--dpo.lora.rank 64 --dpo.lora.alpha 128 --dpo.lora.targets '[q_proj,v_proj]' --dpo.beta 0.2 --dpo.fit.learning_rate 1e-5
    --dpo.fit.batch_size 8 --dpo.fit.accumulate 8 --dpo.fit.epochs 1 --dpo.fit.precision bfloat16)
fi
policies="[helpful=$out/helpful/adapter,harmless=$out/harmless/adapter]"

run sample --out "$out/own" --model "$base" --prompts "$out/prompts/prompts.jsonl" --split train --samples "$samples" "${drawn[@]}"
run score --run "$out/own" --model "$base" --rewards "$rewards"
run label --out "$out/pairs" --run "$out/own" --choice extremes
for name in helpful harmless; do
  run train dpo --out "$out/$name" --model "$base" --pairs "[labelled:$out/pairs/pairs.jsonl]" --dpo.objectives "[$name]" "${dpo[@]}"
done
run soup --out "$out/factors" --adapters "$policies" --steps "$steps" --rule factors
averaged=$(LC_ALL=C awk -v n="$steps" -v out="$out" 'BEGIN { for (i = 0; i <= n; i++) printf "%s%s/factors/w%g_%g", (i ? "," : ""), out, i / n, 1 - i / n }')
run compare --out "$out/compare" --model "$base" --prompts "$out/prompts/prompts.jsonl" --split test "${points[@]}" \
  --methods "{soup: {soup: $policies}, factors: {policies: [$averaged]}, MOD: {mixing: $policies}}" \
  --rewards "$rewards" --judges '[]' --samples 1 --reference_samples 1 --best_of '[]' --sampling.temperature 0.7 "${drawn[@]}"

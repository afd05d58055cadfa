#!/usr/bin/env bash
# MODPO (arXiv 2310.03708) on PKU-SafeRLHF-10K: one policy per weighting of helpful and harmless, beside MOD and soups of DPO policies.
# usage:    pipelines/modpo_saferlhf.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# fetches:  PKU-Alignment/alpaca-7b-reproduced, PKU-SafeRLHF-10K, beaver-7b-v1.0-reward and -cost (about 45 GB)
# needs:    a GPU of 80 GB; not run here. Five trainings of about 250 steps of 96 pairs; the paper states 4.0 GPU hours a policy
# expect:   OUT/compare/report.html: MODPO's three points and the two fronts, on prompts of no training pair
# as there: the margin is the implicit reward of the harmless policy at the same beta 0.1; MODPO trains on helpful pairs at weights
#           0.1, 0.5 and 0.9 of helpful; at 1 it is the helpful policy, at 0 the harmless one, which are trained anyway
# not as in the released code: the rate warms up over a tenth of the steps (its 0.1 is a number of steps), adapters are exact sums in soups
source "$(dirname "$0")/common.sh"
if [ -n "$tiny" ]; then
  run tiny --out "$out/tiny"
  base=$out/tiny/model data=saferlhf:$out/tiny/saferlhf.jsonl shares='{train: 0.7, test: 0.3}'
  dpo=(--dpo.lora.rank 2 --dpo.max_length 128 --dpo.test_share 0.5 --dpo.fit.batch_size 4 --dpo.fit.max_steps 3
    --dpo.fit.learning_rate 1e-2)
  drawn=(--sampling.max_new_tokens 8) rewards='[helpful=long,harmless=readable]' points=(--limit 4 --steps 2 --n_boot 50 --examples 1)
else
  base=$out/base data=saferlhf:PKU-Alignment/PKU-SafeRLHF-10K shares='{train: 0.95, test: 0.05}'
  fetch "$base" PKU-Alignment/alpaca-7b-reproduced
  dpo=(--dpo.lora.rank 64 --dpo.lora.alpha 1 --dpo.lora.targets '[q_proj,k_proj,v_proj,o_proj]' --dpo.beta 0.1 --dpo.max_length 512
    --dpo.test_share 0.1 --dpo.fit.learning_rate 5e-4 --dpo.fit.batch_size 6 --dpo.fit.accumulate 16 --dpo.fit.epochs 3
    --dpo.fit.weight_decay 0.05 --dpo.fit.warmup 0.1 --dpo.fit.precision bfloat16 --dpo.licence 'CC BY-NC 4.0 (PKU-SafeRLHF)')
  drawn=(--sampling.max_new_tokens 256) rewards='[helpful=field:beaver_reward,harmless=field:beaver_cost]' points=(--limit 500 --steps 10)
fi
policies="[helpful=$out/helpful/adapter,harmless=$out/harmless/adapter]"
weighted="[$out/modpo-0.1/adapter,$out/modpo-0.5/adapter,$out/modpo-0.9/adapter]"

run pairs --out "$out/pairs" --sources "[$data]" --shares "$shares"
for name in helpful harmless; do
  run train dpo --out "$out/$name" --model "$base" --pairs "[labelled:$out/pairs/train.jsonl]" --dpo.objectives "[$name]" "${dpo[@]}"
done
for point in "0.1 0.9" "0.5 0.5" "0.9 0.1"; do
  read -r helpful harmless <<< "$point"
  run train modpo --out "$out/modpo-$helpful" --model "$base" --pairs "[labelled:$out/pairs/train.jsonl]" --dpo.objectives '[helpful]' \
    --modpo.margins "[harmless=dpo:$out/harmless/adapter]" --modpo.weights "helpful=$helpful,harmless=$harmless" "${dpo[@]}"
done
run compare --out "$out/compare" --model "$base" --prompts "$out/pairs/prompts.jsonl" --split test "${points[@]}" \
  --methods "{MODPO: {policies: $weighted}, MOD: {mixing: $policies}, soup: {soup: $policies}}" \
  --rewards "$rewards" --judges '[]' --samples 1 --reference_samples 1 --best_of '[]' --sampling.greedy true "${drawn[@]}"

# Sourced by the pipelines on HH-RLHF that begin with one SFT model: its data and settings, those of Rewards-in-Context, and its stages.
# Sets: start, pairs, per_source, sft, rewards, base.
if [ -n "$tiny" ]; then
  run tiny --out "$out/tiny"
  start=$out/tiny/model pairs=hh:$out/tiny/hh.jsonl per_source=30
  sft=(--sft.lora.rank 2 --sft.max_length 128 --sft.test_share 0.5 --sft.fit.batch_size 4 --sft.fit.max_steps 3)
  rewards='[helpful=long,harmless=readable]'
else
  start=meta-llama/Llama-2-7b-hf pairs=hh:$out/hh/train.jsonl per_source=5000
  if [ -z "$list" ] && [ ! -e "$out/hh/train.jsonl" ]; then
    hf download Anthropic/hh-rlhf --repo-type dataset --local-dir "$out/hub" --include 'helpful-base/*' 'harmless-base/*'
    mkdir -p "$out/hh"
    gzip -dc "$out/hub/helpful-base/train.jsonl.gz" "$out/hub/harmless-base/train.jsonl.gz" > "$out/hh/part" && mv "$out/hh/part" "$out/hh/train.jsonl"
  fi
  sft=(--sft.lora.rank 64 --sft.lora.alpha 128 --sft.lora.targets '[q_proj,v_proj]' --sft.fit.learning_rate 1.4e-4 --sft.fit.epochs 1
    --sft.fit.batch_size 8 --sft.fit.precision bfloat16 --sft.fit.checkpoint_every 500 --sft.licence 'MIT (HH-RLHF, Anthropic)')
  rewards='[helpful=field:helpful,harmless=field:harmless]'
fi
base=$out/sft-model/model

run prompts --out "$out/prompts" --sources "[$pairs]" --per_source "$per_source" --shares '{train: 0.8, test: 0.2}'
run train sft --out "$out/sft" --model "$start" --pairs "[$pairs]" "${sft[@]}"
run merge --out "$out/sft-model" --adapter "$out/sft/adapter" --model "$start"

# The scale of the rewards on the SFT model's own responses of $1 tokens: OUT/statistics.json.
own_scale() {
  run sample --out "$out/own" --model "$base" --prompts "$out/prompts/prompts.jsonl" --split train --limit 500 --samples 2 \
    --sampling.max_new_tokens "$1"
  run score --run "$out/own" --model "$base" --rewards "$rewards"
  run normalise --run "$out/own" --out "$out/statistics.json"
}

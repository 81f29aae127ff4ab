//! Kubernetes' quantities as integers, read by `godwit_api`'s rules.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

fn milli(text: &str) -> Option<i128> {
    godwit_api::Quantity(text.to_owned()).milli().ok()
}

/// The amount in whole units (a memory quantity in bytes), rounded up; `None` when it cannot be read.
pub fn units(text: &str) -> Option<i128> {
    milli(text).map(|amount| amount.saturating_add(999).div_euclid(1_000))
}

/// Millicores of an optional CPU quantity; 0 when missing or unreadable.
pub fn cpu_milli(quantity: Option<&Quantity>) -> i128 {
    quantity.and_then(|quantity| milli(&quantity.0)).unwrap_or(0)
}

/// Bytes (or a count) of an optional quantity; 0 when missing or unreadable.
pub fn whole(quantity: Option<&Quantity>) -> i128 {
    quantity.and_then(|quantity| units(&quantity.0)).unwrap_or(0)
}

/// Bytes as a quantity, in mebibytes where that is exact.
pub fn bytes(amount: i128) -> Quantity {
    const MEBI: i128 = 1 << 20;
    if amount > 0 && amount % MEBI == 0 {
        Quantity(format!("{}Mi", amount / MEBI))
    } else {
        Quantity(amount.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_units_round_up() {
        assert_eq!(units("1100m"), Some(2));
        assert_eq!(units("64Mi"), Some(64 << 20));
        assert_eq!(units("much"), None);
        assert_eq!(bytes(64 << 20), Quantity("64Mi".into()));
        assert_eq!(bytes(1000), Quantity("1000".into()));
    }
}
